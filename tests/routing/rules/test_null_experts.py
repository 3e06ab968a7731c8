"""Null experts: against every slot in a loop, and the paper's loss."""

from __future__ import annotations

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
            sums_BE[token % B] += torch.stack(probs[:E]).detach() + float(sum(probs[E:])) / E
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


def test_the_balance_loss_is_the_papers_at_the_target_and_never_moves_the_count():
    # M = E (K - k) / k null slots are balanced with the experts at the mean count k.
    slots, null_slots = 4, 6
    logits_TL = draw(5, num_tokens=60)
    bias = (
        sum(null_crossings(logits_TL, slots).flatten().sort().values[-121:-119]) / 2
    )  # 120 lie above
    logits_TL.requires_grad_()
    routed = route_with_nulls(
        logits_TL, bias, null_slots=null_slots, identity=False, max_experts=slots
    )
    mean = float(routed.experts_T.double().mean())
    assert null_slots == E * (slots - mean) / mean
    fractions_BE = fractions(routed.assignments_BE, len(logits_TL), torch.float64)
    ours = load_balance_loss(routed.prob_sums_BE, fractions_BE, len(logits_TL))
    probs = [oracle.probabilities(list(row), null_slots) for row in logits_TL]
    choices = [oracle.choose(row.detach(), float(bias), null_slots, slots) for row in logits_TL]
    papers = oracle.load_balance_loss(probs, choices, E)
    (of_ours,) = torch.autograd.grad(ours, logits_TL, retain_graph=True)
    (of_papers,) = torch.autograd.grad(papers, logits_TL)
    torch.testing.assert_close(of_papers, slots / mean * of_ours)  # 12 slots against 6

    # Balanced experts, whatever their share: nothing moves tokens from experts to null slots.
    level_TL = torch.zeros(E, E + 1, dtype=torch.float64)
    level_TL[:, :E] += torch.eye(E)
    level_TL.requires_grad_()
    routed = route_with_nulls(level_TL, 0.5, null_slots=E, identity=False, max_experts=2)
    balanced = load_balance_loss(
        routed.prob_sums_BE, fractions(routed.assignments_BE, E, torch.float64), E
    )
    (gradient,) = torch.autograd.grad(balanced, level_TL)
    assert float(balanced) == pytest.approx(1)  # the mean count
    assert gradient.abs().max() < 1e-12
