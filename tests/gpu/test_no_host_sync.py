"""Between logits and combined tokens the host never waits for the device."""

import pytest
import torch

pytest.importorskip("triton")
from megatron_dynmoe.kernels.routing_triton import route_fused
from megatron_dynmoe.moe.permute import order_rows, permute, unpermute
from megatron_dynmoe.routing.route import route
from tests.gpu.stand_in import ON_GPU
from tests.kernels.device import DEVICE

pytestmark = [pytest.mark.megatron, pytest.mark.triton]

T, E, D = (512, 64, 256) if ON_GPU else (12, 4, 8)
either_route = pytest.mark.parametrize("route", [route_fused, route])


def step(route, num_rows: int | None, all_used: bool = True):
    generator = torch.Generator(DEVICE).manual_seed(0)
    make = {"generator": generator, "device": DEVICE, "requires_grad": True}
    logits, tokens = torch.randn(T, E, **make), torch.randn(T, D, **make)
    threshold = torch.full((1,), 0.4, device=DEVICE)
    theta = torch.ones(1, device=DEVICE, requires_grad=True)
    routed = route(logits, threshold, theta=theta, renormalize=True)
    if num_rows is None:
        num_rows = int(routed.map_TE.sum())
    order = order_rows(routed.map_TE, num_rows, all_used)
    rows, weights = permute(tokens, routed.weights_TE, order)
    output = unpermute(rows * weights.unsqueeze(-1), order)
    (output.square().sum() + routed.entropy).backward()
    return num_rows, (output, logits.grad, tokens.grad, theta.grad)


@either_route
def test_no_sync_once_the_number_of_rows_is_known(setting, never_waiting, route):
    num_rows, _ = step(route, None)
    with never_waiting():
        step(route, num_rows)


@either_route
def test_room_for_the_worst_case_changes_no_result(setting, never_waiting, route):
    num_rows, want = step(route, None)
    assert num_rows < T * E
    step(route, T * E, all_used=False)  # kernels are compiled
    with never_waiting():
        _, got = step(route, T * E, all_used=False)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@either_route
def test_steps_repeat_bitwise(setting, route):
    num_rows, one = step(route, None)
    _, other = step(route, num_rows)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.gpu
@either_route
def test_routing_can_be_captured_in_a_cuda_graph(route):
    logits, threshold = torch.randn(T, E, device="cuda"), torch.full((1,), 0.4, device="cuda")
    want = route(logits, threshold)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = route(logits, threshold)
    graph.replay()
    assert torch.equal(got.map_TE, want.map_TE)
    assert torch.equal(got.weights_TE, want.weights_TE)
