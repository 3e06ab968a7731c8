"""Sequences whose tokens lie on several ranks spend their budget as on one, ties included."""

import math
import re

import pytest

from tests.distributed.harness import Case, Results, add
from tests.distributed.sequence_cases import CAP, MEAN, POSITIONS, SEQUENCES

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

SPLIT = [
    add(
        Case(
            f"sequences_tp{tp}_cp{cp}",
            tp * cp,
            f"{tp} {cp}",
            entry="tests.distributed.sequence_cases:main",
        )
    )
    for tp, cp in ((2, 1), (1, 2), (2, 2), (1, 4), (4, 1))
]


@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
def test_a_split_sequence_spends_its_budget_as_a_whole_one(results: Results, case: Case) -> None:
    used = 0
    for rank in range(case.num_ranks):
        (numbers,) = re.findall(r"SLOTS (\d+) USED (\d+) DIFFER (\d+)", results[case].log(rank))
        slots, of_rank, differing = map(int, numbers)
        assert slots == POSITIONS * SEQUENCES * CAP / case.num_ranks
        assert differing == 0
        used += of_rank
    assert SEQUENCES * MEAN * POSITIONS / 2 < used <= SEQUENCES * math.floor(MEAN * POSITIONS)
