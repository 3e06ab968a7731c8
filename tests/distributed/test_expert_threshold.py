"""Expert thresholds through Megatron's loop: over layouts, and resumed.

All layouts start from the same weights, and dropout is off. So they count the same tokens in the
same bins, and their thresholds are the same, up to what float sums in the gradients change later.
"""

from __future__ import annotations

import pytest

from tests.distributed.agreement import (
    GRADIENTS,
    assert_same_gradients,
    assert_same_training,
)
from tests.distributed.harness import Case, Results, add
from tests.distributed.rule_runs import (
    HALF,
    LAYOUTS,
    STEPS,
    TRAIN,
    assert_goes_on,
    assert_near_state,
    assert_resumes_bitwise,
    router_state,
)
from tests.distributed.selection import matrix

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

RULE = f"{TRAIN} --moe-dynamic-routing expert_threshold"
STATE = ("share", "thresholds", "batches")
# A load-balance loss and weights that sum to 1, which are not the defaults.
LOSSES = "--moe-dynamic-balance-loss aux_loss --moe-dynamic-weights renormalized"


def case(name: str, num_ranks: int, flags: str, **fields) -> Case:
    name = f"et_{name}"
    return add(Case(name, num_ranks, f"{RULE} {flags} --save {{dir}}/{name}", **fields))


def resumed(name: str, origin: Case, layout: str) -> Case:
    num_ranks, flags = LAYOUTS[layout]
    flags += f" {LOSSES} --load {{dir}}/{origin.name} --ckpt-step {HALF}"
    return case(name, num_ranks, flags, after=(origin,))


WEIGHTS = case("weights", 1, f"{LOSSES} --train-iters 1 --save-interval 1")
LOAD = f"{LOSSES} --load {{dir}}/{WEIGHTS.name} --finetune --no-load-optim --no-load-rng"
ONE = case("one", 1, LOAD, hooks=GRADIENTS, after=(WEIGHTS,))
MANY = [
    case(name, num_ranks, f"{LOAD} {flags}", hooks=GRADIENTS, after=(WEIGHTS,))
    for name, (num_ranks, flags) in LAYOUTS.items()
    if name != "one"
]
EP2_WHOLE = case("ep2_whole", 2, f"{LOSSES} {LAYOUTS['ep2'][1]}")
RESUMED = {
    "one": (ONE, resumed("one_resumed", ONE, "one")),
    "ep2": (EP2_WHOLE, resumed("ep2_resumed", EP2_WHOLE, "ep2")),
}
RESHARDED = {
    name: (EP2_WHOLE, resumed(f"to_{name}", EP2_WHOLE, name)) for name in ("one", "pp2", "tp2")
}


@pytest.mark.parametrize("layout", matrix(MANY, ("et_pp2_ep2",)))
def test_every_layout_finds_the_same_thresholds(results: Results, layout: Case) -> None:
    one, many = results[ONE], results[layout]
    assert_same_training(one, many)
    assert_same_gradients(one, many)
    expected = router_state(one, STATE)
    assert expected["thresholds"].shape == (2, 8) and (expected["batches"] == STEPS + 1).all()
    # A threshold is a quantile of these few tokens, so there is a token right at it, which tensor
    # parallelism's order of sums moves across.
    assert_near_state(one, many, STATE, atol=2e-3, other_choices=1)
    assert one.losses[-1] < one.losses[0] - 0.1
    assert len(set(one.thresholds)) == STEPS  # the share moves


@pytest.mark.parametrize("name", matrix(RESUMED, ("ep2",)))
def test_resume_equals_one_go_bitwise(results: Results, name: str) -> None:
    whole, resumed = (results[case] for case in RESUMED[name])
    assert_resumes_bitwise(whole, resumed, STATE)


@pytest.mark.parametrize("name", matrix(RESHARDED, ()))
def test_another_layout_goes_on_with_the_thresholds(results: Results, name: str) -> None:
    whole, resumed = (results[case] for case in RESHARDED[name])
    assert_goes_on(whole, resumed, STATE, atol=2e-3)
