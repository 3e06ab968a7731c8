"""The seam for rules: a rule of a test's own is routed, counted, steered and saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dynmoe.control.calibrate import initial_threshold, plant_slope
from megatron_dynmoe.moe.rules import RULES, Rule, TopP
from megatron_dynmoe.routing.route import Routing, route, route_by
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import SettingError
from megatron_dynmoe.settings.routings import DYNAMIC
from tests.moe import one_rank

pytestmark = pytest.mark.megatron
E, D = 8, 16


class Thrift(Rule):
    """Top-p by how much a token leaves out: the larger the number, the fewer experts."""

    knob, direction = "left_out", -1

    def route(
        self, logits_TE: Tensor, state: Mapping[str, Tensor], *, training: bool, **batch: Any
    ) -> Routing:
        return route(logits_TE, 1 - state["left_out"], renormalize=True, **batch)

    @staticmethod
    def crossings(logits_TE: Tensor, max_experts: int | None) -> Tensor:
        return 1 - TopP.crossings(logits_TE, max_experts)


class MinP(Rule):
    """Experts with at least a share of the largest probability, and the first one for NaN."""

    knob, direction = "share", -1

    def route(
        self, logits_TE: Tensor, state: Mapping[str, Tensor], *, training: bool, **batch: Any
    ) -> Routing:
        def select(probs_TE: Tensor) -> Tensor:
            chosen_TE = probs_TE >= state["share"] * probs_TE.max(dim=-1, keepdim=True).values
            first_TE = torch.arange(probs_TE.shape[1]).expand_as(probs_TE) == 0
            return torch.where(chosen_TE.any(dim=-1, keepdim=True), chosen_TE, first_TE)

        return route_by(select, logits_TE, renormalize=True, **batch)

    @staticmethod
    def crossings(logits_TE: Tensor, max_experts: int | None) -> Tensor:
        probs_TE = logits_TE.softmax(dim=-1).sort(dim=-1, descending=True).values
        return probs_TE[:, 1:max_experts] / probs_TE[:, :1]


@pytest.fixture(autouse=True)
def world():
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()


def test_every_dynamic_routing_has_a_rule():
    assert set(RULES) == set(DYNAMIC)


def test_a_rule_refuses_what_it_cannot_do_before_anything_is_built(monkeypatch):
    class EvenCaps(TopP):
        def __init__(self, dynmoe: DynMoEConfig, first: float | None) -> None:
            super().__init__(dynmoe, first)
            cap = dynmoe.max_experts_per_token
            if cap is not None and cap % 2:
                raise SettingError("max_experts_per_token", cap, " and odd", "use an even number")

    monkeypatch.setitem(RULES, "top_p", EvenCaps)
    with pytest.raises(SettingError, match="max_experts_per_token is 3 and odd: use an even"):
        one_rank.moe_layer(DynMoEConfig(routing="top_p", max_experts_per_token=3), num_experts=E)
    one_rank.moe_layer(DynMoEConfig(routing="top_p", max_experts_per_token=4), num_experts=E)


def test_a_falling_count_has_the_same_response_turned_round(monkeypatch):
    rising = [(initial_threshold(E, k), plant_slope(E, k)) for k in (1, 2.5, E)]
    monkeypatch.setitem(RULES, "dtop_p", Thrift)
    falling = [(initial_threshold(E, k), plant_slope(E, k)) for k in (1, 2.5, E)]
    for (threshold, slope), (left_out, other) in zip(rising, falling, strict=True):
        assert left_out == pytest.approx(1 - threshold, abs=1e-4)
        assert other == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("rule", [Thrift, MinP])
def test_a_count_that_falls_with_the_knob_is_held_at_its_target(monkeypatch, rule):
    from megatron_dynmoe.control.update import GlobalBatchUpdate

    monkeypatch.setitem(RULES, "dtop_p", rule)
    target = 3.0
    layer = one_rank.moe_layer(
        DynMoEConfig(routing="dtop_p", target_experts_per_token=target, initial_threshold=0.5),
        num_experts=E,
        hidden_size=D,
    )
    router, update = layer.router, layer.config.finalize_model_grads_func
    assert isinstance(update, GlobalBatchUpdate) and update.direction == -1
    assert {rule.knob, "integral", "measured"} <= set(router.state_dict())
    update.finalize = lambda *_: None
    monkeypatch.setattr("megatron_dynmoe.control.update.finished_iterations", lambda: 0)
    model = torch.nn.ModuleList([layer])
    model.config = layer.config
    generator = torch.Generator().manual_seed(5)
    means = []
    for _ in range(60):
        layer(torch.randn(64, 4, D, generator=generator))
        before = router.knob.clone()
        means.append(float(router.counters.sums.assignments.sum() / router.counters.sums.tokens))
        update([model])
        if abs(means[-1] - target) > 0.5:
            assert (router.knob > before) == (means[-1] > target)
    assert abs(means[0] - target) > 0.2
    assert sum(means[-10:]) / 10 == pytest.approx(target, abs=0.1)
