"""Null experts in Megatron's layer: outputs, gradients, control, and refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_dynmoe.routing.rules.null_experts import null_crossings
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import SettingError
from tests.moe import one_rank
from tests.moe.test_layer import doubles, gated_mlp, hidden_states
from tests.oracles import null_experts as oracle
from tests.oracles.routing import moe

pytestmark = pytest.mark.megatron

D, E, SLOTS, NULLS, BIAS = 8, 4, 3, 5, 0.7
ZERO = DynMoEConfig(
    routing="null_experts",
    target_experts_per_token=1.5,
    max_experts_per_token=SLOTS,
    null_slots=NULLS,
    balance_loss_coeff=0,
)
IDENTITY = dataclasses.replace(ZERO, null_kind="identity")
RAW = dataclasses.replace(IDENTITY, weights="raw")


@pytest.fixture(autouse=True)
def world():
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()


def looped(parameters: dict[str, Tensor], hidden_SBD: Tensor, dynmoe: DynMoEConfig) -> Tensor:
    """The layer written out, every null slot of it; float64."""
    hidden_TD = hidden_SBD.view(-1, D)
    experts = [gated_mlp(parameters, f"experts.local_experts.{expert}") for expert in range(E)]
    weights, choices, residuals = [], [], []
    for hidden_D in hidden_TD:
        logits = (parameters["router.weight"] @ hidden_D).unbind()
        chosen = oracle.choose([logit.detach() for logit in logits], BIAS, NULLS, SLOTS)
        of_experts, of_token = oracle.outputs(
            oracle.probabilities(logits, NULLS),
            chosen,
            E,
            dynmoe.null_kind == "identity",
            dynmoe.weights != "raw",
        )
        weights.append(of_experts)
        residuals.append(of_token * hidden_D)
        choices.append({slot for slot in chosen if slot < E})
    assert {0, 1, 2} <= {len(choice) for choice in choices}
    output_TD = moe(hidden_TD, weights, choices, experts) + torch.stack(residuals)
    if any(name.startswith("shared_experts") for name in parameters):
        shared = gated_mlp(parameters, "shared_experts")
        output_TD = output_TD + torch.stack([shared(hidden_D) for hidden_D in hidden_TD])
    return output_TD.view_as(hidden_SBD)


RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"moe_token_dispatcher_type": "allgather"},
        {"moe_shared_expert_intermediate_size": 6},
        {"moe_shared_expert_intermediate_size": 6, "moe_shared_expert_overlap": True},
        RECOMPUTED,
    ],
    ids=["alltoall", "allgather", "shared", "overlapped", "recomputed"],
)
@pytest.mark.parametrize("dynmoe", [ZERO, IDENTITY, RAW], ids=["zero", "identity", "raw"])
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens_and_slots(dynmoe, settings):
    layer = one_rank.moe_layer(dynmoe, num_experts=E, **settings)
    assert layer.router.weight.shape == (E + 1, D)
    layer.router.null_bias.fill_(BIAS)
    parameters, hidden = doubles(layer), torch.cat([hidden_states(0)] * 2) * 1.0
    hidden[5:] *= -0.5
    hidden_64 = hidden.double().requires_grad_()
    want = looped(parameters, hidden_64, dynmoe)
    hidden.requires_grad_()
    got, _ = layer(hidden)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    got.backward(direction)
    want.backward(direction.double())
    torch.testing.assert_close(hidden.grad.double(), hidden_64.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(
            parameter.grad.double(), parameters[name].grad, rtol=1e-4, atol=1e-5
        )
    assert layer._tokens is None  # nothing outlives the pass


@pytest.mark.parametrize("target", [0.5, 2.0])
def test_the_default_gains_hold_the_mean_number_of_real_experts(monkeypatch, target):
    layer, end_of_batch = one_rank.steered(
        DynMoEConfig(routing="null_experts", target_experts_per_token=target),
        num_experts=8,
        hidden_size=16,
    )
    router = layer.router
    monkeypatch.setattr("megatron_dynmoe.control.update.finished_iterations", lambda: 0)
    router.weight.data[:-1] *= 1.5  # what the controller has not been calibrated for
    generator = torch.Generator().manual_seed(5)
    means = []
    for step in range(70):
        if step == 35:
            router.weight.data[:-1] *= 0.5
        layer(torch.randn(128, 8, 16, generator=generator))
        means.append(float(router.counters.sums.assignments.sum() / router.counters.sums.tokens))
        end_of_batch()
    assert abs(means[0] - target) > 0.1 * target
    for settled in (means[25:35], means[60:]):  # 24 steps settle to 2 %
        assert sum(settled) / 10 == pytest.approx(target, rel=0.05)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_bias_is_the_quantile_of_the_tokens_that_share_it(monkeypatch, scope):
    """Those of all layers if they have one share; however the batch is split."""
    monkeypatch.setattr("megatron_dynmoe.control.update.finished_iterations", lambda: 0)
    dynmoe = dataclasses.replace(ZERO, scope=scope)
    layers = torch.nn.ModuleList([one_rank.moe_layer(dynmoe, num_experts=E) for _ in range(2)])
    layers[1].set_layer_number(2)
    layers[1].router.weight.data[-1] += 1.0
    end_of_batch = one_rank.end_of_batch(*layers)
    batch_SBD = torch.randn(256, 4, D, generator=torch.Generator().manual_seed(3))
    for step in range(4):  # from the wide bins far off the quantile to the fine ones
        crossings, shares = [], []
        for layer in layers:
            for part_SBD in batch_SBD.chunk(step + 1):
                layer(part_SBD)
            logits_TL = batch_SBD.flatten(0, 1) @ layer.router.weight.T.detach()
            crossings.append(null_crossings(logits_TL, SLOTS).flatten())
        end_of_batch()
        shares = [layer.router.share.item() for layer in layers]
        biases = [layer.router.null_bias.item() for layer in layers]
        pooled = [torch.cat(crossings)] * 2 if scope == "global" else crossings
        found = [float((each >= b).double().mean()) for each, b in zip(pooled, biases, strict=True)]
    assert found == pytest.approx([share * E / SLOTS for share in shares], abs=0.01)
    assert (biases[0] == biases[1]) is (scope == "global")


def test_a_token_without_experts_is_counted_and_put_out():
    layer = one_rank.moe_layer(IDENTITY, num_experts=E)
    layer.router.null_bias.fill_(50.0)  # all slots of all tokens are null
    hidden = hidden_states(0).requires_grad_()
    output, _ = layer(hidden)
    torch.testing.assert_close(output, hidden)  # the weights of K copies sum to 1
    sums = layer.router.counters.sums
    assert sums.tokens == 10 and not sums.assignments.any() and not sums.squared_experts
    output.sum().backward()
    assert hidden.grad.isfinite().all()
    silent = one_rank.moe_layer(ZERO, num_experts=E)
    silent.router.null_bias.fill_(50.0)
    assert not silent(hidden.detach())[0].any()


def test_evaluations_have_a_number_of_slots_of_their_own():
    dynmoe = dataclasses.replace(ZERO, inference_max_experts_per_token=2)
    router = one_rank.router(dynmoe, num_experts=E)
    router.null_bias.fill_(-9)
    hidden = hidden_states(0)
    assert set(router(hidden)[1].sum(-1).tolist()) == {3}
    router.eval()
    assert set(router(hidden)[1].sum(-1).tolist()) == {2}


TARGET = (
    "target_experts_per_token is {}: a token may use none and at most {} .all experts., so use "
    "more than 0 to {}"
)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"null_slots": 2},
            r"is 2, fewer than the 3 slots of a token \(max_experts.*use 3 or more",
        ),
        ({"null_slots": 0}, "null_slots is 0, fewer than the 3"),
        ({"null_slots": -1}, "null_slots is -1, fewer than the 3"),
        (
            {"max_experts_per_token": 1, "inference_max_experts_per_token": 3, "null_slots": 2}
            | {"target_experts_per_token": 0.5},
            r"fewer than the 3 slots of a token \(inference_max_experts_per_token\)",
        ),
        # The cap, which is twice the target by default, was not given.
        ({"target_experts_per_token": 0, "max_experts_per_token": None}, TARGET.format(0, E, E)),
        ({"target_experts_per_token": -1, "max_experts_per_token": None}, TARGET.format(-1, E, E)),
        ({"target_experts_per_token": 9, "max_experts_per_token": None}, TARGET.format(9, E, E)),
        ({"target_experts_per_token": 4}, r"is 4: a token may use none and at most 3 \(max_exp"),
        (
            {"target_experts_per_token": "1e308", "max_experts_per_token": None},
            "is 1e.308: a token",
        ),
        ({"max_experts_per_token": 0}, "max_experts_per_token is 0: use 1 to .*leave it out.$"),
        (
            {"max_experts_per_token": None, "null_slots": 2},
            "the 3 slots that a token has unless max_experts_per_token is given: use 3 or more",
        ),
        (
            {"max_experts_per_token": None, "inference_max_experts_per_token": 3, "null_slots": 2},
            r"fewer than the 3 slots of a token \(inference_max_experts_per_token\)",
        ),
        ({"null_slots": 2**64}, f"null_slots is {2**64}: use 3 to {2**63 - 1}"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused_before_a_model_is_built(settings, message):
    with pytest.raises(SettingError, match=message):
        dataclasses.replace(ZERO, **settings).resolve(E)
