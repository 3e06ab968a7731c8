"""Sequences split over ranks by the attention of torch_native, through Megatron's loop.

Dropout is off, and all layouts start from the same weights. So every layout trains as one rank
does, up to the order of float sums: losses, gradients, counts, losses of the routers, thresholds.
"""

from typing import Any

import pytest

from tests.distributed.agreement import GRADIENTS, assert_same_gradients, assert_same_training
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

CP2 = "--context-parallel-size 2 --cp-comm-type a2a"
CP4 = "--context-parallel-size 4 --cp-comm-type a2a"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
GQA = "--group-query-attention --num-query-groups 2 --qk-layernorm"
# Coefficients as large as the loss: a mistake in a loss of the routers shows in every gradient.
LARGE = "--moe-aux-loss-coeff 1.0 --moe-dynamic-dynamic-loss-coeff 1.0"
# Tensor parallelism pads the vocabulary to a multiple of this times its ranks.
VOCABULARY = "--make-vocab-size-divisible-by 16"
BY_SEQUENCE = "--moe-router-load-balancing-type seq_aux_loss"
BY_BATCH = "--moe-router-load-balancing-type global_aux_loss"
BY_MICRO_BATCH = "--moe-router-load-balancing-type aux_loss"
PER_TOKEN = "--calculate-per-token-loss"

# name: flags of both, then ranks and flags of the layouts
TRAININGS: dict[str, tuple[str, dict[str, tuple[int, str]]]] = {
    "by_sequence": (
        f"{LARGE} {BY_SEQUENCE} {GQA}",
        {"cp2": (2, CP2), "cp2_ep2": (2, f"{CP2} {EP2}"), "cp2_dp2": (4, CP2)},
    ),
    "by_batch": (
        f"{LARGE} {BY_BATCH}",
        {"cp2_by_batch": (2, CP2), "cp4_ep2": (4, f"{CP4} {EP2}")},
    ),
    "per_token": (f"{LARGE} {PER_TOKEN} {BY_SEQUENCE}", {"cp2_pp2": (4, f"{CP2} {PP2}")}),
    "tp2": (f"{LARGE} {VOCABULARY} {BY_MICRO_BATCH}", {"cp2_tp2": (4, f"{CP2} {TP2} {EP2}")}),
}


def case(name: str, num_ranks: int, flags: str, **fields: Any) -> Case:
    flags = f"{TINY} {DTOP_P} --moe-token-dispatcher-type alltoall {flags}"
    return add(Case(f"context_{name}", num_ranks, flags, **fields))


def loaded(name: str, num_ranks: int, flags: str, weights: Case) -> Case:
    flags += f" --load {{dir}}/{weights.name} --finetune --no-load-optim --no-load-rng"
    return case(name, num_ranks, flags, hooks=GRADIENTS, after=(weights,))


def weights(name: str, flags: str) -> Case:
    flags += f" --save {{dir}}/context_{name} --save-interval 1 --train-iters 1"
    return case(name, 1, flags)


QUICK = ("cp2", "cp2_ep2", "cp2_by_batch", "cp2_pp2")
SPLIT = []
for name, (flags, layouts) in TRAININGS.items():
    saved = weights(f"{name}_weights", flags)
    whole = loaded(name, 1, flags, saved)
    SPLIT += [
        pytest.param(
            whole,
            loaded(layout, num_ranks, f"{flags} {more}", saved),
            marks=[] if layout in QUICK else [pytest.mark.long],
            id=layout,
        )
        for layout, (num_ranks, more) in layouts.items()
    ]


@pytest.mark.parametrize(("whole", "split"), SPLIT)
def test_a_split_sequence_trains_as_a_whole_one(results: Results, whole: Case, split: Case) -> None:
    assert_same_training(results[whole], results[split])
    assert_same_gradients(results[whole], results[split])
