"""ReLU routing through Megatron's loop: over layouts, resumed, and taken to another layout.

All layouts start from the same weights with lambda so large that the L1 loss is felt from step 1;
dropout is off. So gates, counts and lambda are the same, up to the order of float sums.
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
)
from tests.distributed.selection import matrix

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

RULE = f"{TRAIN} --moe-dynamic-routing relu --moe-dynamic-initial-threshold -1.5"
STATE = ("log10_lambda",)


def case(name: str, layout: str, flags: str = "", **fields) -> Case:
    name, (num_ranks, layout_flags) = f"relu_{name}", LAYOUTS[layout]
    flags = f"{RULE} {layout_flags} {flags} --save {{dir}}/{name}"
    return add(Case(name, num_ranks, flags, **fields))


def resumed(name: str, origin: Case, layout: str, flags: str = "") -> Case:
    flags += f" --load {{dir}}/{origin.name} --ckpt-step {HALF}"
    return case(name, layout, flags, after=(origin,))


WEIGHTS = case("weights", "one", "--train-iters 1 --save-interval 1")
LOAD = f"--load {{dir}}/{WEIGHTS.name} --finetune --no-load-optim --no-load-rng"
FIELDS = {"hooks": GRADIENTS, "after": (WEIGHTS,)}
ONE = case("one", "one", LOAD, **FIELDS)
MANY = [case(name, name, LOAD, **FIELDS) for name in LAYOUTS if name != "one"]
SIGN = "--moe-dynamic-control-law sign --moe-dynamic-scope layer"
EP2_WHOLE = case("ep2_whole", "ep2")
SIGN_WHOLE = case("sign_whole", "one", SIGN)
RESUMED = {
    "ep2": (EP2_WHOLE, resumed("ep2_resumed", EP2_WHOLE, "ep2")),
    "one, sign": (SIGN_WHOLE, resumed("sign_resumed", SIGN_WHOLE, "one", SIGN)),
}
RESHARDED = {
    name: (EP2_WHOLE, resumed(f"to_{name}", EP2_WHOLE, name)) for name in ("one", "pp2", "tp2")
}


@pytest.mark.parametrize("layout", matrix(MANY, ("relu_tp2_ep2",)))
def test_every_layout_has_the_same_gates_and_the_same_lambda(results: Results, layout: Case):
    one, many = results[ONE], results[layout]
    assert_same_training(one, many)
    assert_same_gradients(one, many)
    assert_near_state(one, many, STATE, atol=1e-5)
    assert one.losses[-1] < one.losses[0] - 0.1
    assert len(set(one.thresholds)) == STEPS  # lambda moves
    assert one.assignments[-1] != one.assignments[0]


@pytest.mark.parametrize("name", matrix(RESUMED, ("ep2",)))
def test_resume_equals_one_go_bitwise(results: Results, name: str) -> None:
    whole, resumed = (results[case] for case in RESUMED[name])
    assert_resumes_bitwise(whole, resumed, STATE)


@pytest.mark.parametrize("name", matrix(RESHARDED, ()))
def test_another_layout_goes_on_with_lambda(results: Results, name: str) -> None:
    whole, resumed = (results[case] for case in RESHARDED[name])
    assert_goes_on(whole, resumed, STATE, atol=1e-5)
