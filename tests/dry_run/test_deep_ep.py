"""How far tokens travel with DeepEP."""

import random

import pytest

from megatron_dynmoe.dry_run.stand_ins.deep_ep import ranks_of_a_token


@pytest.mark.parametrize(
    ("experts", "ranks", "k"), [(64, 8, 8), (16, 4, 2), (16, 16, 3), (8, 2, 5), (8, 1, 2)]
)
def test_ranks_of_a_token_against_draws(experts, ranks, k):
    draw, local = random.Random(0), experts // ranks
    drawn = [len({e // local for e in draw.sample(range(experts), k)}) for _ in range(20_000)]
    expected = sum(drawn) / len(drawn)
    assert ranks_of_a_token(experts, ranks, k) == pytest.approx(expected, rel=0.01)


def test_a_mean_between_two_numbers_lies_between_theirs():
    few, between, many = (ranks_of_a_token(64, 8, k) for k in (2, 2.5, 3))
    assert 1 < few < between < many < 3
