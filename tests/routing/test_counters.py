"""Counts stay whole numbers at the size of a real global batch: 4 M tokens, 24 layers, 16 experts.

That is up to 2**22 tokens an expert, 2**26 assignments a layer and 1.6e9 in all: more than float32
can count (2**24), and far less than what float64, in which the ranks' counts are added up, can
(2**53).
"""

import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dynmoe.control import PIController
from megatron_dynmoe.routing.counters import RoutingCounters, RoutingStatistics, clear, pack
from megatron_dynmoe.routing.route import route

TOKENS, LAYERS = 4 * 2**20, 24
CPU = torch.device("cpu")
WHOLE = ("tokens", "tokens_at_cap", "squared_experts")


def counted(assignments_E: list[int], tokens: int, squared: int) -> RoutingCounters:
    counters = RoutingCounters(len(assignments_E), CPU)
    counters.sums.assignments.copy_(torch.tensor(assignments_E))
    counters.sums.tokens.fill_(tokens)
    counters.sums.squared_experts.fill_(squared)
    return counters


def packed_layers(counters: list[RoutingCounters], num_experts: int) -> Tensor:
    """Those of layers 1, 2, ..., all with a theta of 1 and a threshold of 0.4."""
    state = torch.tensor([0.0, 0.4, 0.0]).split(1)
    routers = {number: (each, state) for number, each in enumerate(counters, 1)}
    return pack(routers, LAYERS, num_experts, CPU)


@settings(max_examples=10)
@given(
    num_experts=st.sampled_from([16, 64]),
    num_ranks=st.sampled_from([1, 7, 64]),
    seed=st.integers(0, 2**32 - 1),
    whole=st.booleans(),
)
def test_sums_over_ranks_are_exact_in_any_order(
    num_experts: int, num_ranks: int, seed: int, whole: bool
) -> None:
    """Against Python's integers; ``whole``: every token to every expert, the most there can be."""
    chance = random.Random(seed)
    share = [TOKENS // num_ranks + (rank < TOKENS % num_ranks) for rank in range(num_ranks)]
    totals = [[0] * num_experts for _ in range(LAYERS)]
    squares, packed = [0] * LAYERS, []
    for tokens in share:
        rows = []
        for layer in range(LAYERS):
            chosen = [tokens if whole else chance.randint(0, tokens) for _ in range(num_experts)]
            squared = tokens * num_experts**2 if whole else chance.randint(0, tokens * 2**12)
            totals[layer] = [a + b for a, b in zip(totals[layer], chosen, strict=True)]
            squares[layer] += squared
            rows.append(counted(chosen, tokens, squared))
        packed.append(packed_layers(rows, num_experts))
    for _ in range(3):
        reduced = RoutingStatistics(added_up_in_some_order(list(packed), chance))
        assert reduced.assignments.tolist() == totals
        assert reduced.tokens.tolist() == [TOKENS] * LAYERS
        assert reduced.squared_experts.tolist() == squares
        assignments = sum(map(sum, totals))
        mean = Fraction(assignments, LAYERS * TOKENS)
        assert reduced.pooled().assignments.sum().item() == assignments
        assert reduced.pooled().mean_experts.item() == float(mean), "rounded once"
        assert reduced.mean_experts.tolist() == [
            float(Fraction(sum(layer), TOKENS)) for layer in totals
        ]
    if num_ranks > 1 and not whole:
        in_float32 = added_up_in_some_order([part.float() for part in packed], chance)
        assert RoutingStatistics(in_float32).assignments.sum().item() != assignments, (
            "or this shows nothing"
        )


def added_up_in_some_order(parts: list[Tensor], chance: random.Random) -> Tensor:
    """As an all-reduce may: any two partial sums at a time."""
    while len(parts) > 1:
        chance.shuffle(parts)
        parts.append(parts.pop() + parts.pop())
    return parts[0]


@pytest.mark.parametrize("num_experts", [16, 64])
def test_micro_batches_are_counted_exactly(num_experts: int) -> None:
    """2,048 micro-batches of 2,048 tokens, on counters that hold more than float32 could count."""
    counters = RoutingCounters(num_experts, CPU)
    generator = torch.Generator().manual_seed(3)
    before, tokens, cap, nothing_wrong = 2**24, 2048, num_experts // 2, torch.tensor(0)
    counters.sums.assignments.fill_(before)
    expected = dict.fromkeys(WHOLE, 0)
    by_expert = [before] * num_experts
    kinds = [
        torch.rand(tokens, num_experts, generator=generator) < share for share in (0.1, 0.5, 0.9)
    ]
    for index in range(TOKENS // tokens):
        map_TE = kinds[index % 3]
        counters.add_counts(map_TE.sum(dim=0), map_TE.sum(dim=-1), cap, None, nothing_wrong)
    for index, map_TE in enumerate(kinds):
        times = len(range(index, TOKENS // tokens, 3))
        experts = map_TE.sum(dim=-1).tolist()
        expected["tokens"] += times * tokens
        expected["squared_experts"] += times * sum(k * k for k in experts)
        expected["tokens_at_cap"] += times * experts.count(cap)
        chosen = map_TE.sum(dim=0).tolist()
        by_expert = [a + times * b for a, b in zip(by_expert, chosen, strict=True)]
    assert counters.sums.assignments.tolist() == by_expert
    assert {name: getattr(counters.sums, name).item() for name in expected} == expected
    assert counters.row.dtype == torch.float64
    clear([counters])
    assert not counters.row.any()


@pytest.mark.parametrize("numbers", [[], [2], [1, 3], [3, 1, 2]])
def test_each_router_has_the_row_of_its_layer(numbers: list[int]) -> None:
    routers = {
        number: (
            counted([number, 2 * number], 10 * number, 0),
            torch.tensor([0.5, 0.25, -number]).split(1),
        )
        for number in numbers
    }
    packed = RoutingStatistics(pack(routers, 3, 2, CPU))
    has_router = [number in numbers for number in (1, 2, 3)]
    assert packed.routers.tolist() == has_router
    assert packed.theta_offsets.tolist() == [0.5 * has for has in has_router]
    assert [theta == 1.5 for theta in packed.thetas.tolist()] == has_router
    assert packed.knobs.tolist() == [0.25 * has for has in has_router]
    expected = [number * has for number, has in zip((1, 2, 3), has_router, strict=True)]
    assert packed.integrals.neg().tolist() == expected
    assert packed.tokens.tolist() == [10 * number for number in expected]
    assert packed.assignments.tolist() == [[number, 2 * number] for number in expected]


def test_one_more_assignment_reaches_the_controller() -> None:
    """The measurement is still float64 where the law takes it."""
    law = PIController(16, 0.33, 0.13, 0.43)
    counts = []
    for more in (0, 2**10):  # 2.4e-6 experts per token, less than float32 resolves at 16
        rows = [counted([TOKENS] * 16, TOKENS, 0) for _ in range(LAYERS)]
        rows[0].sums.assignments[0] -= more
        measured = RoutingStatistics(packed_layers(rows, 16)).pooled().mean_experts
        assert measured.dtype == torch.float64
        counts.append(measured.item())
        threshold, integral = law.step(torch.tensor([0.33]), torch.zeros(1), measured, 16.0)
    assert counts[0] - counts[1] == pytest.approx(2**10 / (LAYERS * TOKENS), rel=1e-9)
    assert integral.item() == pytest.approx(2**10 / (LAYERS * TOKENS) / 16)
    assert threshold.item() > 0.33


@pytest.mark.parametrize(
    ("tokens", "num_experts"),
    [
        (2**18 + 3, 16),  # more than a block of the CPU path
        pytest.param(2**24 + 5, 1, marks=pytest.mark.long),  # an odd count float32 cannot hold
    ],
)
def test_a_large_micro_batch_is_counted_exactly(tokens: int, num_experts: int) -> None:
    """Sums within a block are float32, which is exact up to the size of a block."""
    routed = route(torch.zeros(tokens, num_experts), threshold=1.0)
    assert routed.assignments_BE.dtype == routed.experts_T.dtype == torch.int64
    assert routed.assignments_BE.tolist() == [[tokens] * num_experts]
    assert routed.experts_T.sum().item() == tokens * num_experts
