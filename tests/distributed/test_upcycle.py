"""An upcycled model trains on from the dense model's loss."""

from __future__ import annotations

import pytest

from tests.distributed.harness import Case, Results, add
from tests.distributed.test_conversion import CASES, LAYOUTS, REAL_TEXT, TEXT, from_hf

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

STEPS = 10
TRAINING = (
    f"{REAL_TEXT} --micro-batch-size 2 --global-batch-size 8 --train-iters {STEPS} --lr 3e-3 "
    "--lr-decay-style constant --lr-warmup-iters 0 --log-interval 1 --eval-iters 0 "
    "--eval-interval 1000 --num-workers 0 --distributed-timeout-minutes 5 "
    "--no-create-attention-mask-in-dataloader --exit-on-missing-checkpoint"
)
FOLDER = add(Case("dense_folder", flags="{dir}/dense_folder", entry=f"{CASES}:save_dense"))
DTOP_P = "--routing dtop_p --target-experts-per-token 2"


def trained(name: str, flags: str, layout: str = "one") -> Case:
    """A checkpoint of the dense folder, and a few steps from there with the flags beside it."""
    made = from_hf(FOLDER, f"{name}_made", flags)
    num_ranks, layout_flags = LAYOUTS[layout]
    flags = f"@{{dir}}/{made.name}/training_flags.txt --load {{dir}}/{made.name} {layout_flags}"
    return add(Case(name, num_ranks, f"{TRAINING} {flags}", after=(made, TEXT)))


DENSE = trained("dense_on", "")
UPCYCLED = {
    "top-k": trained("upcycled_top_k", "--upcycle-experts 8"),
    "top-k, quarters": trained(
        "upcycled_quarters", "--upcycle-experts 16 --upcycle-granularity 4", "pp2ep2"
    ),
    "DTop-p": trained("upcycled_dtop_p", f"--upcycle-experts 8 {DTOP_P}", "ep2"),
}


@pytest.mark.parametrize("name", UPCYCLED)
def test_training_begins_at_the_dense_models_loss(results: Results, name: str) -> None:
    dense, upcycled = results[DENSE].losses, results[UPCYCLED[name]].losses
    assert len(dense) == len(upcycled) == STEPS
    assert upcycled[0] == pytest.approx(dense[0], rel=2e-6)
    assert upcycled[1] != pytest.approx(dense[1], rel=2e-6)  # from then on it is another model
    assert upcycled[-1] < upcycled[0] - 0.2


def test_a_threshold_is_steered_from_the_first_step_on(results: Results) -> None:
    result = results[UPCYCLED["DTop-p"]]
    assert result.experts_per_token[0] == pytest.approx(2, rel=0.25)
    assert result.thresholds[0] != result.thresholds[-1]
