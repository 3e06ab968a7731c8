"""Documents kept apart through Megatron's loop: against upstream's masks, and under every layout.

A hook makes the documents of the mock data so short that a row holds several. Dropout is off, so
runs that should agree do so up to the order of float sums.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from tests.distributed.agreement import GRADIENTS, assert_same_gradients, assert_same_training
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

APART = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
# Coefficients as large as the loss: a mistake in a loss of the routers shows in every gradient.
LARGE = "--moe-aux-loss-coeff 1.0 --moe-dynamic-dynamic-loss-coeff 1.0"
ALWAYS = (
    "--make-vocab-size-divisible-by 16 --moe-token-dispatcher-type alltoall "
    "--calculate-per-token-loss"
)
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
CP2 = "--context-parallel-size 2 --cp-comm-type a2a --expert-model-parallel-size 2"
# Four chunks of one layer: two of them lie between the first and the last.
PP2 = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"


@contextlib.contextmanager
def short_documents(recorder: Any) -> Iterator[None]:
    """A row of 32 tokens holds about four documents of 1 to 15 tokens."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    from tests.distributed.faults import replaced

    with replaced(MockGPTLowLevelDataset, "max_sequence_length", 16):
        yield


def case(name: str, num_ranks: int, flags: str, gradients: bool = True, **fields: Any) -> Case:
    tiny = TINY.replace("--no-create-attention-mask-in-dataloader", "")
    flags = f"{tiny} {DTOP_P} {APART} {LARGE} {ALWAYS} {flags}"
    hooks = (f"{__name__}:short_documents", *(GRADIENTS if gradients else ()))
    return Case(f"documents_{name}", num_ranks, flags, hooks=hooks, **fields)


WEIGHTS = case(
    "weights",
    1,
    "--save {dir}/documents_weights --save-interval 1 --train-iters 1",
    gradients=False,
)
add(WEIGHTS)


def loaded(name: str, num_ranks: int, flags: str) -> Case:
    flags += " --load {dir}/documents_weights --finetune --no-load-optim --no-load-rng"
    return case(name, num_ranks, flags, after=(WEIGHTS,))


NATIVE = add(loaded("native", 1, ""))
LOCAL = add(loaded("local", 1, "--moe-dynamic-backend local"))
JOINED = add(
    dataclasses.replace(
        NATIVE, name="documents_joined", flags=NATIVE.flags.replace(APART, "--eod-mask-loss")
    )
)
# With gradients that are means of micro-batches' means: the two halves of a row differ in how many
# of their tokens count.
BY_MICRO_BATCH = [
    add(
        dataclasses.replace(
            loaded(f"{name}_by_micro_batch", num_ranks, flags),
            flags=loaded("", num_ranks, flags).flags.replace("--calculate-per-token-loss", ""),
        )
    )
    for name, num_ranks, flags in (("native", 1, ""), ("cp2", 2, CP2))
]
LAYOUTS = {
    "cp2": add(loaded("cp2", 2, CP2)),
    "pp2": add(loaded("pp2", 2, f"{PP2} {FULL} --micro-batch-size 1")),
}


def test_boundaries_train_as_upstreams_masks(results: Results) -> None:
    assert_same_training(results[LOCAL], results[NATIVE])
    assert_same_gradients(results[LOCAL], results[NATIVE], tolerance=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_stay_apart_under_every_layout(results: Results, layout: str) -> None:
    assert_same_training(results[NATIVE], results[LAYOUTS[layout]])
    assert_same_gradients(results[NATIVE], results[LAYOUTS[layout]])


def test_tokens_of_a_split_row_count_alike(results: Results) -> None:
    whole, split = (results[case] for case in BY_MICRO_BATCH)
    assert_same_training(whole, split)
    assert_same_gradients(whole, split)


def test_documents_that_are_not_kept_apart_train_otherwise(results: Results) -> None:
    """Or the tests above would compare nothing."""
    assert abs(results[JOINED].losses[0] - results[NATIVE].losses[0]) > 1e-4
