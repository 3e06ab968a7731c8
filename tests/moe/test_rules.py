"""The seam for rules: a rule of a test's own is routed, counted, steered and saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dynmoe.control.calibrate import initial_threshold, plant_slope
from megatron_dynmoe.moe.rules import RULES, Rule, TopP
from megatron_dynmoe.routing.losses import sum_by_sequence, sum_entropy
from megatron_dynmoe.routing.route import Routing, route
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import SettingError
from megatron_dynmoe.settings.routings import DYNAMIC, ROUTINGS
from tests.moe import one_rank
from tests.moe.min_p import MinP

pytestmark = pytest.mark.megatron
E, D = 8, 16


class Thrift(Rule):
    """Top-p by how much a token leaves out: the larger the number, the fewer experts."""

    knob, direction, entries = "left_out", -1, ("left_out",)

    def route(
        self,
        logits_TE: Tensor,
        state: Mapping[str, Tensor],
        *,
        training: bool,
        group: Any,
        **batch: Any,
    ) -> Routing:
        return route(logits_TE, 1 - state["left_out"], renormalize=True, **batch)

    @staticmethod
    def crossings(logits_TE: Tensor, max_experts: int | None) -> Tensor:
        return 1 - TopP.crossings(logits_TE, max_experts)


class Quotas(Rule):
    """Each expert takes the tokens above its own threshold, which follows its number of tokens.

    A toy with all that a rule may have: a row of the gate beside those of the experts, state of its
    own and sums for it, and tokens without an expert. No number is controlled.
    """

    entries = ("thresholds",)

    def __init__(self, dynmoe: DynMoEConfig, first: float | None, num_experts: int) -> None:
        super().__init__(dynmoe, first, num_experts)
        self.first_state = {"thresholds": tuple(i / 8 - 0.5 for i in range(num_experts))}
        self.extra_logits, self.num_sums = 1, num_experts + 1

    def route(
        self,
        logits_TE: Tensor,
        state: Mapping[str, Tensor],
        *,
        theta: Tensor | None,
        num_sequences: int,
        valid_T: Tensor | None,
        training: bool,
        group: Any,
    ) -> Routing:
        assert logits_TE.shape[1] == self.num_experts + 1
        scores_TE = logits_TE[:, :-1].sigmoid()
        map_TE = logits_TE[:, :-1] > state["thresholds"]
        assignments_BE = sum_by_sequence(map_TE, num_sequences, valid_T)
        num_tokens = assignments_BE.new_tensor([len(map_TE)])
        return Routing(
            scores_TE * map_TE,
            map_TE,
            map_TE.sum(dim=-1),
            sum_by_sequence(scores_TE, num_sequences, valid_T),
            sum_entropy(scores_TE, valid_T),
            assignments_BE,
            (~logits_TE.isfinite().all(dim=-1)).sum(),
            torch.cat([assignments_BE.sum(dim=0), num_tokens]).double(),
        )

    def next_state(
        self, state: Mapping[str, Tensor], sums_RW: Tensor, next_knob_R1: Tensor | None
    ) -> Mapping[str, Tensor]:
        assert next_knob_R1 is None
        shares_RE = sums_RW[:, :-1] / sums_RW[:, -1:]
        return {"thresholds": (state["thresholds"] + shares_RE - 0.25).float()}


@pytest.fixture
def quotas(monkeypatch):
    """A layer with that rule, and what ends its global batch."""
    monkeypatch.setitem(RULES, "top_p", Quotas)
    monkeypatch.setitem(ROUTINGS, "top_p", dataclasses.replace(ROUTINGS["top_p"], least_experts=0))
    monkeypatch.setattr("megatron_dynmoe.control.update.finished_iterations", lambda: 0)
    return one_rank.steered(DynMoEConfig(routing="top_p"), num_experts=E, hidden_size=D)


def hidden(seed: int) -> Tensor:
    return torch.randn(16, 4, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def world():
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()


def test_every_dynamic_routing_has_a_rule():
    assert set(RULES) == set(DYNAMIC)


def test_a_rule_refuses_what_it_cannot_do_before_anything_is_built(monkeypatch):
    class EvenCaps(TopP):
        def __init__(self, dynmoe: DynMoEConfig, first: float | None, num_experts: int) -> None:
            super().__init__(dynmoe, first, num_experts)
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
    assert isinstance(update, GlobalBatchUpdate) and update.rule.direction == -1
    assert {rule.knob, "integral", "measured"} <= set(router.state_dict())
    end_of_batch = one_rank.end_of_batch(layer)
    monkeypatch.setattr("megatron_dynmoe.control.update.finished_iterations", lambda: 0)
    generator = torch.Generator().manual_seed(5)
    means = []
    for _ in range(60):
        layer(torch.randn(64, 4, D, generator=generator))
        before = router.knob.clone()
        means.append(float(router.counters.sums.assignments.sum() / router.counters.sums.tokens))
        end_of_batch()
        if abs(means[-1] - target) > 0.5:
            assert (router.knob > before) == (means[-1] > target)
    assert abs(means[0] - target) > 0.2
    assert sum(means[-10:]) / 10 == pytest.approx(target, abs=0.1)


def test_a_rule_keeps_state_of_its_own_and_moves_it_by_the_sums_of_a_global_batch(quotas):
    layer, end_of_batch = quotas
    router = layer.router
    assert router.weight.shape == (E + 1, D)
    assert router.state_dict()["thresholds"].shape == (E,)
    for _ in range(2):  # the sums start anew
        before = router.state["thresholds"].clone()
        batches = [hidden(seed).requires_grad_() for seed in (1, 2, 3)]
        chosen = []
        for batch in batches:
            layer(batch)
            logits_TE = torch.nn.functional.linear(batch, router.weight)[..., :-1]
            chosen.append(logits_TE.flatten(end_dim=1) > before)
        with torch.no_grad():  # an evaluation, and the first pass of recomputation
            layer(hidden(4))
            layer.eval()
            layer(hidden(5))
            layer.train()
        assert torch.equal(router.state["thresholds"], before)  # until the batch has ended
        end_of_batch()
        share_E = torch.cat(chosen).double().mean(dim=0)
        expected = before + share_E - 0.25
        torch.testing.assert_close(router.state["thresholds"], expected.float())
        assert router.measured.item() == pytest.approx(share_E.sum().item(), rel=1e-6)
    assert router.state["thresholds"].dtype == torch.float32
    router.bfloat16()
    assert router.state["thresholds"].dtype == torch.float32


def test_a_logit_that_is_not_finite_leaves_the_state_as_it_is(quotas):
    layer, end_of_batch = quotas
    before = layer.router.state["thresholds"].clone()
    layer(hidden(1))
    spoilt = hidden(2)
    spoilt[3, 1] = torch.nan
    layer(spoilt)
    end_of_batch()
    assert torch.equal(layer.router.state["thresholds"], before)
    layer(hidden(1))
    end_of_batch()
    assert not torch.equal(layer.router.state["thresholds"], before)


def test_a_token_may_have_no_expert(quotas):
    layer, end_of_batch = quotas
    layer.router.thresholds.fill_(2.0)
    batch = hidden(1).requires_grad_()
    output, _ = layer(batch)
    empty = ~layer.router(batch)[1].any(dim=-1).view(16, 4)
    assert 0 < empty.sum() < empty.numel()
    assert (output[empty] == 0).all() and output[~empty].any(dim=-1).all()
    output.square().sum().backward()
    assert batch.grad.isfinite().all()
    layer.router.thresholds.fill_(1e6)  # and so may all of them
    output, _ = layer(hidden(2))
    assert not output.any()
    layer.router.counters.sums_W.zero_()
    layer.router.counters.row.zero_()
    layer(hidden(2))
    end_of_batch()
    assert layer.router.measured.item() == 0
