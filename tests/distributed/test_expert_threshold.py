"""Expert thresholds through Megatron's loop: over layouts, and resumed.

All layouts start from the same weights, and dropout is off. So they count the same tokens in the
same bins, and their thresholds are the same, up to what float sums in the gradients change later.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.agreement import (
    GRADIENTS,
    assert_same_gradients,
    assert_same_training,
    tensors,
)
from tests.distributed.harness import TINY, Case, CaseResult, Results, add
from tests.distributed.selection import matrix

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

HALF, STEPS = 3, 6
ROUTER = "decoder.layers.mlp.router."
TRAIN = (
    f"{TINY} --num-layers 2 --make-vocab-size-divisible-by 16 --moe-token-dispatcher-type alltoall "
    f"--train-iters {STEPS} --save-interval {HALF} --ckpt-format torch_dist "
    "--moe-dynamic-routing expert_threshold --moe-dynamic-target-experts-per-token 2"
)
EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
CP2 = "--context-parallel-size 2 --cp-comm-type a2a"
# A load-balance loss and weights that sum to 1, which are not the defaults.
LOSSES = "--moe-dynamic-balance-loss aux_loss --moe-dynamic-weights renormalized"
LAYOUTS = {
    "dp2": (2, ""),
    "ep2": (2, EP2),
    "pp2": (2, PP2),
    "tp2": (2, TP2),
    "cp2": (2, CP2),
    "pp2_ep2": (4, f"{PP2} {EP2}"),
    "tp2_ep2": (4, f"{TP2} {EP2}"),
}


def case(name: str, num_ranks: int, flags: str, **fields) -> Case:
    name = f"et_{name}"
    return add(Case(name, num_ranks, f"{TRAIN} {flags} --save {{dir}}/{name}", **fields))


def resumed(name: str, origin: Case, layout: str) -> Case:
    num_ranks, flags = LAYOUTS.get(layout, (1, ""))
    flags += f" {LOSSES} --load {{dir}}/{origin.name} --ckpt-step {HALF}"
    return case(name, num_ranks, flags, after=(origin,))


WEIGHTS = case("weights", 1, f"{LOSSES} --train-iters 1 --save-interval 1")
LOAD = f"{LOSSES} --load {{dir}}/{WEIGHTS.name} --finetune --no-load-optim --no-load-rng"
ONE = case("one", 1, LOAD, hooks=GRADIENTS, after=(WEIGHTS,))
MANY = [
    case(name, num_ranks, f"{LOAD} {flags}", hooks=GRADIENTS, after=(WEIGHTS,))
    for name, (num_ranks, flags) in LAYOUTS.items()
]
EP2_WHOLE = case("ep2_whole", 2, f"{LOSSES} {EP2}")
RESUMED = {
    "one": (ONE, resumed("one_resumed", ONE, "one")),
    "ep2": (EP2_WHOLE, resumed("ep2_resumed", EP2_WHOLE, "ep2")),
}
RESHARDED = {
    name: (EP2_WHOLE, resumed(f"to_{name}", EP2_WHOLE, name)) for name in ("one", "pp2", "tp2")
}


def router_state(result: CaseResult, step: int = STEPS) -> dict[str, torch.Tensor]:
    saved = tensors(result.directory / result.case.name / f"iter_{step:07d}")
    names = ("share", "thresholds", "batches", "integral", "measured")
    return {name: saved[ROUTER + name] for name in names}


@pytest.mark.parametrize("layout", matrix(MANY, ("et_pp2_ep2", "et_tp2", "et_cp2")))
def test_every_layout_finds_the_same_thresholds(results: Results, layout: Case) -> None:
    one, many = results[ONE], results[layout]
    assert_same_training(one, many)
    assert_same_gradients(one, many)
    expected, found = router_state(one), router_state(many)
    assert expected["thresholds"].shape == (2, 8) and (expected["batches"] == STEPS + 1).all()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-3)
    assert one.losses[-1] < one.losses[0] - 0.1
    assert len(set(one.thresholds)) == STEPS  # the share moves


@pytest.mark.parametrize("name", matrix(RESUMED, ("ep2",)))
def test_resume_equals_one_go_bitwise(results: Results, name: str) -> None:
    whole, resumed = (results[case] for case in RESUMED[name])
    assert resumed.losses == whole.losses[HALF:]
    expected, found = router_state(whole), router_state(resumed)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", matrix(RESHARDED, ("tp2",)))
def test_another_layout_goes_on_with_the_thresholds(results: Results, name: str) -> None:
    whole, resumed = (results[case] for case in RESHARDED[name])
    assert resumed.losses == pytest.approx(whole.losses[HALF:], rel=1e-5)
    expected, found = router_state(whole), router_state(resumed)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-3)
