"""Tokens whose logits are NaN or infinite are counted, wherever they are and however it is done."""

import pytest
import torch

from megatron_dynmoe.kernels import routing_cpu
from megatron_dynmoe.kernels.routing_cpu import route_in_blocks
from megatron_dynmoe.routing.route import route
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank

T, E = 24, 4
BAD = (3, 4, 17)
either_route = pytest.mark.parametrize("route", [route, route_in_blocks])


def spoiled(value: float, rows=BAD) -> torch.Tensor:
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    for row in rows:
        logits[row, row % E] = value
    return logits


@either_route
@pytest.mark.parametrize("theta", [None, torch.ones(1)], ids=["raw", "drn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_each_such_token_counts_once(monkeypatch, value, theta, route):
    # Several blocks, of which some have none.
    monkeypatch.setattr(routing_cpu, "BLOCK_ELEMENTS", 8 * E)
    routed = route(spoiled(value), 0.6, theta=theta)
    assert routed.not_finite == len(BAD)
    assert routed.not_finite.dtype == torch.int64
    good = [row for row in range(T) if row not in BAD]
    plain = route(spoiled(0.0), 0.6, theta=theta)
    assert torch.equal(routed.map_TE[good], plain.map_TE[good])
    assert plain.not_finite == 0


@either_route
def test_infinities_that_cancel_count(route):
    logits = spoiled(0.0)
    logits[5, :2] = torch.tensor([float("inf"), float("-inf")])
    logits[6] = float("-inf")
    assert route(logits, 0.6).not_finite == 2


@pytest.mark.parametrize("value", [1e30, -1e30, 3e38])
@either_route
def test_large_logits_are_finite(value, route):
    logits = torch.zeros(T, E)
    logits[:2] = value  # whose sum is not finite
    assert route(logits, 0.6).not_finite == 0


@either_route
def test_padding_counts_as_well(route):
    """It enters no loss, but its NaN would: 0 times NaN."""
    valid = torch.arange(T) < 10
    assert route(spoiled(float("nan")), 0.6, valid_T=valid).not_finite == len(BAD)


@either_route
def test_no_tokens(route):
    assert route(torch.empty(0, E), 0.6).not_finite == 0


@pytest.mark.megatron
@pytest.mark.parametrize("recompute", [False, True])
def test_a_router_counts_once_and_tells_of_its_last_pass(recompute):
    from megatron.core import tensor_parallel

    one_rank.world_of_one()
    router = one_rank.router(DynMoEConfig(routing="top_p"), num_experts=E, hidden_size=8)
    hidden = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(1))
    hidden[2, 1, 0] = torch.nan
    hidden.requires_grad_()
    if recompute:
        weights = tensor_parallel.checkpoint(lambda h: router(h)[0], False, hidden)
        assert router.counters.sums.not_finite == 0  # without gradients nothing is counted yet,
        assert router.last_not_finite == 1  # and is known all the same
    else:
        weights, _ = router(hidden)
    weights.nan_to_num().sum().backward()
    assert router.counters.sums.not_finite == router.last_not_finite == 1
    assert router.evaluation_counters.sums.not_finite == 0

    router.eval()
    with torch.no_grad():
        router(hidden)
        router(hidden.nan_to_num())
    assert router.evaluation_counters.sums.not_finite == 1
    assert router.last_not_finite == 0
    assert router.counters.sums.not_finite == 1
    one_rank.forget_global_state()
