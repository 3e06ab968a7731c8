"""Rules with nothing but their defaults: over layouts, resumed, and taken to another layout.

Null experts then have a share and a bias for each layer. Their balance loss is that of the global
batch so far, so gradients depend on how many ranks share the batch: where two do, the first step
counts alike, and so ends with the same shares and biases, and later ones differ a little.
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
from tests.distributed.harness import Case, CaseResult, Results, add
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

STATE = {
    "null_experts": ("share", "null_bias"),
    "expert_threshold": ("share", "thresholds", "batches"),
}
LAYERS = 2


def case(rule: str, name: str, layout: str, flags: str = "", **fields) -> Case:
    name, (num_ranks, layout_flags) = f"{rule}_defaults_{name}", LAYOUTS[layout]
    flags = f"{TRAIN} --moe-dynamic-routing {rule} {layout_flags} {flags} --save {{dir}}/{name}"
    return add(Case(name, num_ranks, flags, **fields))


def loaded(rule: str, layout: str) -> Case:
    """With the weights, and a checkpoint after the first step as well."""
    origin = WEIGHTS[rule]
    load = f"--load {{dir}}/{origin.name} --finetune --no-load-optim --no-load-rng"
    flags = f"{load} --save-interval 1"
    return case(rule, layout, layout, flags, hooks=GRADIENTS, after=(origin,))


def resumed(rule: str, origin: Case, layout: str) -> Case:
    flags = f"--load {{dir}}/{origin.name} --ckpt-step {HALF}"
    return case(rule, f"to_{layout}", layout, flags, after=(origin,))


FIRST = "--train-iters 1 --save-interval 1"
WEIGHTS = {rule: case(rule, "weights", "one", FIRST) for rule in STATE}
NULLS_ONE = loaded("null_experts", "one")
NULLS_PP2 = loaded("null_experts", "pp2")
NULLS_PP2_EP2 = loaded("null_experts", "pp2_ep2")
THRESHOLDS_ONE = loaded("expert_threshold", "one")
THRESHOLDS_MANY = [loaded("expert_threshold", layout) for layout in ("pp2_ep2", "tp2")]
RESUMED = {
    "null_experts": (NULLS_PP2_EP2, resumed("null_experts", NULLS_PP2_EP2, "pp2_ep2")),
    "expert_threshold": (
        THRESHOLDS_MANY[0],
        resumed("expert_threshold", THRESHOLDS_MANY[0], "pp2_ep2"),
    ),
}
RESHARDED = {
    "null_experts": (NULLS_PP2, resumed("null_experts", NULLS_PP2, "one")),
    "expert_threshold": (
        THRESHOLDS_MANY[0],
        resumed("expert_threshold", THRESHOLDS_MANY[0], "one"),
    ),
}


def first_state(result: CaseResult, rule: str) -> dict[str, torch.Tensor]:
    """What the first step made of the routers' state."""
    saved = tensors(result.directory / result.case.name / "iter_0000001")
    names = (*STATE[rule], "integral", "measured")
    return {name: saved[f"decoder.layers.mlp.router.{name}"] for name in names}


def test_each_layer_has_its_own_share_and_bias(results: Results) -> None:
    one, pipelined = results[NULLS_ONE], results[NULLS_PP2]
    assert pipelined.losses == pytest.approx(one.losses, rel=1e-4)
    assert pipelined.assignments[0] == one.assignments[0]
    assert_same_gradients(one, pipelined)
    state = router_state(one, STATE["null_experts"])
    for values in (state["share"], state["null_bias"]):
        assert values.shape == (LAYERS, 1) and values[0] != values[1]
    assert_near_state(one, pipelined, STATE["null_experts"], atol=2e-3, other_choices=1)
    assert one.losses[-1] < one.losses[0] - 0.1


def test_ranks_that_share_a_batch_count_it_as_one(results: Results) -> None:
    one, many = results[NULLS_ONE], results[NULLS_PP2_EP2]
    assert many.assignments[0] == one.assignments[0]
    assert many.by_layer("threshold")[0] == one.by_layer("threshold")[0]
    expected, found = (first_state(result, "null_experts") for result in (one, many))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    # The balance loss is another one, so this is as near as the losses are.
    assert many.losses[0] == pytest.approx(one.losses[0], rel=1e-6)
    assert many.losses == pytest.approx(one.losses, rel=1e-2)


@pytest.mark.parametrize("layout", matrix(THRESHOLDS_MANY, (THRESHOLDS_MANY[0].name,)))
def test_without_a_balance_loss_every_layout_trains_alike(results: Results, layout: Case) -> None:
    one, many = results[THRESHOLDS_ONE], results[layout]
    assert_same_training(one, many)
    assert_same_gradients(one, many)
    assert (router_state(one, STATE["expert_threshold"])["batches"] == STEPS + 1).all()
    assert_near_state(one, many, STATE["expert_threshold"], atol=2e-3, other_choices=1)


@pytest.mark.parametrize("rule", matrix(RESUMED, ("null_experts",)))
def test_resume_equals_one_go_bitwise(results: Results, rule: str) -> None:
    whole, resumed = (results[case] for case in RESUMED[rule])
    assert_resumes_bitwise(whole, resumed, STATE[rule])


@pytest.mark.parametrize("rule", matrix(RESHARDED, ()))
def test_another_layout_goes_on_with_the_state(results: Results, rule: str) -> None:
    """For null experts one whose ranks share no batch, so that the loss is the same."""
    whole, resumed = (results[case] for case in RESHARDED[rule])
    assert_goes_on(whole, resumed, STATE[rule], atol=2e-3)
