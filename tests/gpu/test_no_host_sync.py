"""Between logits and combined tokens the host never waits for the device."""

import pytest
import torch

from megatron_dynmoe.kernels.routing_triton import route_fused
from megatron_dynmoe.moe.experts import grouped_linear, uses_grouped_mm
from megatron_dynmoe.moe.permute import order_rows, permute, unpermute
from megatron_dynmoe.routing.route import route

pytestmark = [pytest.mark.gpu, pytest.mark.megatron]

T, E, D = 512, 64, 256
either_route = pytest.mark.parametrize("route", [route_fused, route])


def step(route, num_rows: int | None, all_used: bool = True):
    generator = torch.Generator("cuda").manual_seed(0)
    make = {"generator": generator, "device": "cuda", "requires_grad": True}
    logits, tokens = torch.randn(T, E, **make), torch.randn(T, D, **make)
    threshold = torch.full((1,), 0.4, device="cuda")
    theta = torch.ones(1, device="cuda", requires_grad=True)
    routed = route(logits, threshold, theta=theta, renormalize=True)
    if num_rows is None:
        num_rows = int(routed.map_TE.sum())
    order = order_rows(routed.map_TE, num_rows, all_used)
    rows, weights = permute(tokens, routed.weights_TE, order)
    output = unpermute(rows * weights.unsqueeze(-1), order)
    (output.square().sum() + routed.entropy).backward()
    return num_rows, (output, logits.grad, tokens.grad, theta.grad)


@either_route
def test_no_sync_once_the_number_of_rows_is_known(route):
    num_rows, _ = step(route, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(route, num_rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@either_route
def test_room_for_the_worst_case_changes_no_result(route):
    num_rows, want = step(route, None)
    assert num_rows < T * E
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, got = step(route, T * E, all_used=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@either_route
def test_steps_repeat_bitwise(route):
    num_rows, one = step(route, None)
    _, other = step(route, num_rows)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


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


def test_experts_run_in_bf16_without_a_copy_to_the_host():
    device = torch.device("cuda")
    if not uses_grouped_mm(device, torch.bfloat16, 64, 128):
        pytest.skip("grouped_mm has no kernel for this GPU: it needs Hopper or later")
    counts = torch.tensor([7, 0, 130, 63], device=device)  # not multiples of a tile or of 8
    rows = torch.randn(200, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 128, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = grouped_linear(rows, weight, counts)
        output.backward(torch.ones_like(output))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    starts = [0, *counts.cumsum(0).tolist()]
    for expert in range(4):
        part = slice(starts[expert], starts[expert + 1])
        torch.testing.assert_close(
            output[part], rows[part] @ weight[expert].t(), rtol=2e-2, atol=2e-1
        )
        expected = torch.ones_like(output[part]).t() @ rows[part]
        torch.testing.assert_close(weight.grad[expert], expected, rtol=2e-2, atol=2e-1)
