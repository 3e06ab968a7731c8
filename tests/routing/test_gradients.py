"""gradcheck in float64 through everything between logits and losses."""

import pytest
import torch

from megatron_dynmoe.kernels import routing_cpu
from megatron_dynmoe.kernels.routing_cpu import route_in_blocks
from megatron_dynmoe.routing.losses import (
    count_tokens,
    dynamic_loss,
    fractions,
    load_balance_loss,
    sum_by_sequence,
    sum_entropy,
)
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.route import route
from megatron_dynmoe.routing.select import select, weigh

S, B, E = 4, 2, 5
either_route = pytest.mark.parametrize("route", [route, route_in_blocks])


def routing(logits, theta, values, threshold, renormalize, valid, normalized):
    """A task loss on the weights, the balance loss and the dynamic loss, as a router has them."""
    if normalized:
        logits = normalize(logits, theta)
    probs = logits.softmax(-1)
    routing_map = select(probs, threshold)
    weights = weigh(probs, routing_map, renormalize)
    tokens, total = count_tokens(routing_map, B, valid)
    f = fractions(sum_by_sequence(routing_map, B, valid), tokens, probs.dtype)
    return (
        (weights * values).sum().tanh(),
        load_balance_loss(sum_by_sequence(probs, B, valid), f, tokens),
        dynamic_loss(sum_entropy(probs, valid), total),
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.55, 1.0])
def test_gradcheck(threshold, renormalize, normalized, padded):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(S * B, E, generator=generator, dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    values = torch.randn(S * B, E, generator=generator, dtype=torch.float64)
    valid = torch.rand(S * B, generator=generator) < 0.7 if padded else None

    def function(logits, theta):
        return routing(logits, theta, values, threshold, renormalize, valid, normalized)

    # A step across the threshold would change the map, which is not differentiated.
    probs = (normalize(logits, theta) if normalized else logits).softmax(-1)
    sums = probs.sort(descending=True).values.cumsum(-1)[:, :-1]
    assert (sums - threshold).abs().min() > 1e-4
    inputs = (logits, theta) if normalized else (logits, theta.detach())
    assert torch.autograd.gradcheck(function, inputs)


@either_route
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_one_step_equals_its_parts_and_passes_gradcheck(renormalize, normalized, padded, route):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(S * B, E, generator=generator, dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([1.3], dtype=torch.float64, requires_grad=normalized)
    valid = torch.rand(S * B, generator=generator) < 0.7 if padded else None

    def one_step(logits, theta):
        return route(
            logits,
            0.55,
            theta=theta if normalized else None,
            renormalize=renormalize,
            num_sequences=B,
            valid_T=valid,
        )

    routed = one_step(logits, theta)
    probs = (normalize(logits, theta) if normalized else logits).softmax(-1)
    routing_map = select(probs, 0.55)
    kept = probs if valid is None else probs * valid.unsqueeze(-1)
    assert torch.equal(routed.map_TE, routing_map)
    assert torch.equal(routed.experts_T, routing_map.sum(-1))
    assert torch.equal(routed.assignments_BE, sum_by_sequence(routing_map, B, valid))
    torch.testing.assert_close(routed.weights_TE, weigh(probs, routing_map, renormalize))
    torch.testing.assert_close(routed.prob_sums_BE, kept.view(S, B, E).sum(0))
    torch.testing.assert_close(routed.entropy, sum_entropy(probs, valid))

    def function(logits, theta):
        routed = one_step(logits, theta)
        return routed.weights_TE, routed.prob_sums_BE, routed.entropy

    assert torch.autograd.gradcheck(function, (logits, theta))


def test_blocks_of_tokens_change_nothing(monkeypatch):
    logits = torch.randn(S * B, E, generator=torch.Generator().manual_seed(3), requires_grad=True)
    theta = torch.tensor([1.3], requires_grad=True)
    results = []
    for elements in (1, 3 * B * E, 1 << 20):
        monkeypatch.setattr(routing_cpu, "BLOCK_ELEMENTS", elements)
        routed = route_in_blocks(logits, 0.55, theta=theta, renormalize=True, num_sequences=B)
        loss = routed.weights_TE.square().sum() + routed.entropy + routed.prob_sums_BE[1, 2]
        results.append((*routed, *torch.autograd.grad(loss, (logits, theta))))
    for other in results[:-1]:
        for one, whole in zip(other, results[-1], strict=True):
            torch.testing.assert_close(one, whole)


@either_route
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("theta", [None, torch.tensor([1.3])], ids=["", "normalized"])
def test_the_strides_of_the_logits_change_nothing(theta, renormalize, route):
    contiguous = torch.randn(S * B, E, generator=torch.Generator().manual_seed(3))
    wide = torch.cat([contiguous, contiguous], dim=1)
    results = []
    for logits in (contiguous, contiguous.t().contiguous().t(), wide[:, :E]):
        logits = logits.detach().requires_grad_()
        routed = route(logits, 0.55, theta=theta, renormalize=renormalize, num_sequences=B)
        loss = routed.weights_TE.square().sum() + routed.entropy + routed.prob_sums_BE[1, 2]
        given = [value for value in routed if value is not None]
        results.append((*given, *torch.autograd.grad(loss, logits)))
    for other in results[1:]:
        for one, want in zip(other, results[0], strict=True):
            assert torch.equal(one, want)


def test_tokens_that_fill_no_positions_are_refused():
    with pytest.raises(ValueError, match=r"7 tokens.*num_sequences 2"):
        route(torch.randn(7, E), 0.5, num_sequences=2)


@pytest.mark.parametrize("loss", [0, 1, 2], ids=["task", "balance", "dynamic"])
def test_theta_receives_a_gradient_from_every_loss(loss):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(S * B, E, generator=generator, dtype=torch.float64)
    values = torch.randn(S * B, E, generator=generator, dtype=torch.float64)
    theta = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    routing(logits, theta, values, 0.55, True, None, True)[loss].backward()
    assert theta.grad.abs() > 1e-6
