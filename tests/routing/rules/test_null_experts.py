"""Null experts: against every slot in a loop, and the paper's loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_dynmoe.moe.rules.null_experts import route_with_nulls
from megatron_dynmoe.routing.losses import fractions, load_balance_loss
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.rules.null_experts import null_crossings, select_above_null
from tests.oracles import null_experts as oracle
from tests.oracles.routing import choices_of

T, B, E = 48, 2, 6


def draw(seed: int, num_tokens: int = T, num_experts: int = E) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts + 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize(("null_slots", "slots", "bias"), [(6, 4, 0.3), (9, 6, 0.9), (4, 1, 0.0)])
def test_weights_counts_sums_and_gradients_are_those_of_every_slot_in_a_loop(
    null_slots, slots, bias, identity, renormalize
):
    logits_TL = draw(0).requires_grad_()
    valid_T = torch.arange(T) % 7 != 3
    routed = route_with_nulls(
        logits_TL,
        bias,
        null_slots=null_slots,
        identity=identity,
        max_experts=slots,
        renormalize=renormalize,
        num_sequences=B,
        valid_T=valid_T,
    )
    weights, residuals, entropy = [], [], 0.0
    sums_BE, assignments_BE = torch.zeros(2, B, E, dtype=torch.float64)
    for token, row in enumerate(logits_TL):
        chosen = oracle.choose(row.detach(), bias, null_slots, slots)
        assert choices_of(routed.map_TE)[token] == {slot for slot in chosen if slot < E}
        probs = oracle.probabilities(row.unbind(), null_slots)
        of_experts, of_token = oracle.outputs(probs, chosen, E, identity, renormalize)
        weights.append(torch.stack(of_experts))
        residuals.append(of_token)
        if valid_T[token]:
            entropy += oracle.entropy(probs)
            sums_BE[token % B] += torch.stack(probs[:E]).detach() / float(sum(probs[:E]))
            assignments_BE[token % B, sorted(slot for slot in chosen if slot < E)] += 1
    counts = {int(count) for count in routed.experts_T}
    assert 0 in counts and len(counts) > 1  # tokens without an expert are part of the case
    torch.testing.assert_close(routed.weights_TE, torch.stack(weights))
    torch.testing.assert_close(routed.prob_sums_BE, sums_BE)
    assert float(routed.entropy) == pytest.approx(entropy)
    assert torch.equal(routed.experts_T, routed.map_TE.sum(-1))
    assert torch.equal(routed.assignments_BE.double(), assignments_BE)

    towards_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(1)).double()
    expected = (torch.stack(weights) * towards_TE).sum()
    actual = (routed.weights_TE * towards_TE).sum()
    if identity:
        assert routed.residual_T is not None
        assert routed.residual_T.tolist() == pytest.approx([float(weight) for weight in residuals])
        expected = expected + sum(weight * (token % 5) for token, weight in enumerate(residuals))
        actual = actual + (routed.residual_T * (torch.arange(T) % 5)).sum()
    else:
        assert routed.residual_T is None
    (wanted,) = torch.autograd.grad(expected, logits_TL, retain_graph=True)
    (got,) = torch.autograd.grad(actual, logits_TL)
    torch.testing.assert_close(got, wanted)


def test_float32_is_near_float64_and_theta_normalizes_all_logits():
    logits_TL = draw(2)
    theta = torch.tensor([1.5], dtype=torch.float64)
    kwargs = {"null_slots": 6, "identity": True, "max_experts": 4}
    exact = route_with_nulls(logits_TL, -0.2, theta=theta, **kwargs)
    by_hand = route_with_nulls(normalize(logits_TL, theta), -0.2, **kwargs)
    torch.testing.assert_close(exact.weights_TE, by_hand.weights_TE)
    single = route_with_nulls(logits_TL.float(), -0.2, theta=theta.float(), **kwargs)
    assert torch.equal(single.map_TE, exact.map_TE)
    for name in ("weights_TE", "residual_T", "prob_sums_BE", "entropy"):
        value = getattr(single, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), getattr(exact, name), atol=1e-4, rtol=1e-5)


def test_a_crossing_is_the_last_bias_at_which_the_token_uses_the_expert():
    logits_TL = draw(3)
    for slots in (None, 3):
        crossings_TK = null_crossings(logits_TL, slots)
        assert crossings_TK.shape == (T, slots or E)
        assert (crossings_TK.diff(dim=-1) <= 0).all()
        for place in range(crossings_TK.shape[1]):
            at_T1 = crossings_TK[:, place : place + 1]
            below = select_above_null(logits_TL, at_T1 - 1e-12, slots).sum(-1)
            above = select_above_null(logits_TL, at_T1 + 1e-12, slots).sum(-1)
            assert (below == place + 1).all() and (above == place).all()


def test_tokens_without_experts_with_ties_and_with_nan_have_defined_weights_and_gradients():
    logits_TL = torch.tensor([[0.0, 1.0, 9.0], [2.0, 0.0, 0.0], [0.0, torch.nan, 0.0]])
    logits_TL.requires_grad_()
    routed = route_with_nulls(logits_TL, 0.0, null_slots=2, identity=False, max_experts=2)
    assert routed.map_TE.tolist() == [[False, False], [True, True], [True, False]]
    assert routed.weights_TE[0].tolist() == [0, 0]
    assert routed.not_finite == 1 and routed.weights_TE[2].isnan().any()
    (gradient,) = torch.autograd.grad(routed.weights_TE[:2].square().sum(), logits_TL)
    assert gradient[:2].isfinite().all()
    # A bias at which all tokens lose all experts, and one at which none does.
    for bias, count in ((50.0, 0), (-50.0, 2)):
        assert (select_above_null(logits_TL[:2].detach(), bias, 2).sum(-1) == count).all()


def balance(logits_TL: Tensor, bias: float, null_slots: int, slots: int) -> tuple[Tensor, Tensor]:
    """The balance loss, and the mean number of experts."""
    routed = route_with_nulls(
        logits_TL, bias, null_slots=null_slots, identity=False, max_experts=slots
    )
    fractions_BE = fractions(routed.assignments_BE, len(logits_TL), torch.float64)
    loss = load_balance_loss(routed.prob_sums_BE, fractions_BE, len(logits_TL))
    return loss, routed.experts_T.double().mean()


def test_the_balance_loss_is_the_papers_where_null_slots_have_their_share():
    """At the target, with the paper's M, and each token's null slots at their part of all slots."""
    slots, null_slots = 4, 6
    experts_TE = draw(5, num_tokens=60)[:, :E].requires_grad_()
    # So the null slots of every token have the probability M / (E + M), whatever its experts do.
    null_T1 = experts_TE.logsumexp(dim=-1, keepdim=True) - math.log(E)
    logits_TL = torch.cat([experts_TE, null_T1], dim=-1)
    crossings = null_crossings(logits_TL.detach(), slots).flatten().sort().values
    bias = float(crossings[-121:-119].mean())  # 120 lie above: 2 experts per token
    ours, mean = balance(logits_TL, bias, null_slots, slots)
    assert null_slots == E * (slots - float(mean)) / float(mean)
    probs = [oracle.probabilities(list(row), null_slots) for row in logits_TL]
    choices = [oracle.choose(row.detach(), bias, null_slots, slots) for row in logits_TL]
    papers = oracle.load_balance_loss(probs, choices, E)
    # The part of the null slots does not change.
    assert float(papers) == pytest.approx(float(ours + null_slots / E * mean))
    (of_ours,) = torch.autograd.grad(ours, experts_TE, retain_graph=True)
    (of_papers,) = torch.autograd.grad(papers, experts_TE)
    assert of_ours.abs().max() > 1e-4
    torch.testing.assert_close(of_papers, of_ours)


def test_the_balance_loss_cannot_be_lowered_by_the_null_logit():
    """Whatever the load: a null logit that rises while its bias falls changes no choice."""
    logits_TL = draw(6)
    logits_TL[:, 0] += 2.0
    found = []
    for shift in (0.0, 8.0):
        shifted_TL = (logits_TL + shift * (torch.arange(E + 1) == E)).requires_grad_()
        loss, mean = balance(shifted_TL, 0.4 - shift, null_slots=E, slots=3)
        (gradient_TL,) = torch.autograd.grad(loss, shifted_TL)
        assert float(loss) > 1.2 * float(mean)  # far from balanced
        assert (gradient_TL[:, E] == 0).all()
        found.append((loss.detach(), gradient_TL))
    torch.testing.assert_close(*found)
