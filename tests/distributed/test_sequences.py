"""SeqTopK over ranks: sequences spend their budget as on one, and the training is the same."""

import math
import re
from typing import Any

import pytest

from tests.distributed.agreement import GRADIENTS, assert_same_gradients
from tests.distributed.harness import SEQ_TOP_K, TINY, Case, Results, add
from tests.distributed.selection import matrix
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
    for tp, cp in ((2, 2), (2, 1), (1, 2), (1, 4), (4, 1))
]

PADDED = add(
    Case("sequences_padded", 2, entry="tests.distributed.sequence_cases:losses_with_padding")
)

CP2 = "--context-parallel-size 2 --cp-comm-type a2a"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
# A coefficient as large as the loss: a mistake in the balance loss shows in every gradient.
LARGE = "--moe-dynamic-balance-loss-coeff 1.0"
VOCABULARY = "--make-vocab-size-divisible-by 16"  # which tensor parallelism pads to


def case(name: str, num_ranks: int, flags: str, **fields: Any) -> Case:
    flags = f"{TINY} {SEQ_TOP_K} {LARGE} {VOCABULARY} --moe-token-dispatcher-type alltoall {flags}"
    return add(Case(f"seq_top_k_{name}", num_ranks, flags, **fields))


SAVED = case("weights", 1, "--save {dir}/seq_top_k --save-interval 1 --train-iters 1")
LOAD = "--load {dir}/seq_top_k --finetune --no-load-optim --no-load-rng"


def loaded(name: str, num_ranks: int, flags: str) -> Case:
    return case(name, num_ranks, f"{LOAD} {flags}", hooks=GRADIENTS, after=(SAVED,))


WHOLE = loaded("one_rank", 1, "")
LAYOUTS = [
    loaded("cp2_tp2_ep2", 4, f"{CP2} {TP2} {EP2}"),
    loaded("pp2_ep2", 4, f"{PP2} {EP2}"),
    loaded("cp2", 2, CP2),
    loaded("tp2", 2, TP2),
    loaded("dp2", 2, ""),
]


@pytest.mark.parametrize("case", matrix(SPLIT, ("sequences_tp2_cp2",)), ids=lambda case: case.name)
def test_a_split_sequence_spends_its_budget_as_a_whole_one(results: Results, case: Case) -> None:
    used = 0
    for rank in range(case.num_ranks):
        (numbers,) = re.findall(r"SLOTS (\d+) USED (\d+) DIFFER (\d+)", results[case].log(rank))
        slots, of_rank, differing = map(int, numbers)
        assert slots == POSITIONS * SEQUENCES * CAP / case.num_ranks
        assert differing == 0
        used += of_rank
    assert SEQUENCES * MEAN * POSITIONS / 2 < used <= SEQUENCES * math.floor(MEAN * POSITIONS)


def test_losses_of_a_split_sequence_leave_padding_out_as_those_of_a_whole_one(
    results: Results,
) -> None:
    results[PADDED].check()  # the ranks compare


@pytest.mark.parametrize("layout", matrix(LAYOUTS, ("seq_top_k_cp2_tp2_ep2",)))
def test_every_layout_trains_as_one_rank(results: Results, layout: Case) -> None:
    one, many = results[WHOLE], results[layout]
    assert many.losses[0] == pytest.approx(one.losses[0], rel=1e-6)
    assert many.losses == pytest.approx(one.losses, rel=1e-4)
    assert many.assignments[0] == one.assignments[0]
    assert many.experts_per_token == one.experts_per_token == [1.5] * len(one.losses)
    for expected, actual in zip(one.by_layer("threshold"), many.by_layer("threshold"), strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)
        assert len(set(actual.values())) == len(actual)  # each layer has its own
    assert_same_gradients(one, many)
