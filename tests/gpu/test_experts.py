"""The experts' GEMMs and the sum of a token's rows, with kernels and without."""

import pytest
import torch

from megatron_dynmoe.moe import permute
from megatron_dynmoe.moe.fused import fused_experts
from megatron_dynmoe.moe.grouped_linear import grouped_linear, uses_grouped_mm
from tests.gpu.stand_in import ON_GPU
from tests.kernels.device import DEVICE

pytestmark = [pytest.mark.megatron, pytest.mark.triton]

INPUTS, OUTPUTS = (256, 512) if ON_GPU else (16, 24)
COUNTS = [7, 0, 130, 63, 0]  # not multiples of a tile or of 8; two experts without rows
T, E, D = (4096, 64, 1024) if ON_GPU else (9, 5, 16)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value of a tensor

either_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16"])


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCES[got.dtype] * want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("counts_on", sorted({"cpu", DEVICE}))
@either_dtype
def test_experts_equal_products_one_by_one_and_without_rows_have_zero_gradients(
    setting, poisoned_memory, dtype, counts_on
):
    rows = normal(sum(COUNTS), INPUTS, dtype=dtype)
    weight = normal(len(COUNTS), OUTPUTS, INPUTS, dtype=dtype)
    direction = normal(sum(COUNTS), OUTPUTS, dtype=dtype).detach()
    with poisoned_memory():
        output = grouped_linear(rows, weight, torch.tensor(COUNTS, device=counts_on))
        output.backward(direction)
    parts = zip(rows.double().split(COUNTS), weight.double(), strict=True)
    assert_close(output, torch.cat([rows_e @ weight_e.T for rows_e, weight_e in parts]))
    parts = zip(direction.double().split(COUNTS), weight.double(), strict=True)
    assert_close(rows.grad, torch.cat([direction_e @ weight_e for direction_e, weight_e in parts]))
    parts = zip(direction.double().split(COUNTS), rows.double().split(COUNTS), strict=True)
    want = torch.stack([direction_e.T @ rows_e for direction_e, rows_e in parts])
    assert_close(weight.grad, want)
    unused = [count == 0 for count in COUNTS]
    assert not weight.grad[unused].any()  # to the bit


@either_dtype
def test_fused_experts_without_rows_have_zero_gradients(poisoned_memory, dtype):
    pytest.importorskip("triton")
    rows = normal(sum(COUNTS), INPUTS, dtype=dtype)
    first = normal(len(COUNTS), 2 * OUTPUTS, INPUTS, dtype=dtype)
    second = normal(len(COUNTS), INPUTS, OUTPUTS, dtype=dtype)
    probs, counts = torch.ones(sum(COUNTS), device=DEVICE), torch.tensor(COUNTS, device=DEVICE)
    with poisoned_memory():
        fused_experts(rows, probs, first, second, counts).float().square().sum().backward()
    unused = [count == 0 for count in COUNTS]
    for weight in (first, second):
        assert weight.grad.isfinite().all() and weight.grad.any()
        assert not weight.grad[unused].any()  # to the bit


def test_grouped_mm_runs_without_a_copy_to_the_host(never_waiting):
    if not uses_grouped_mm(torch.device(DEVICE), torch.bfloat16, INPUTS, OUTPUTS):
        pytest.skip("grouped_mm has no kernel for this GPU: it needs Hopper or later")
    rows = normal(sum(COUNTS), INPUTS, dtype=torch.bfloat16)
    weight = normal(len(COUNTS), OUTPUTS, INPUTS, dtype=torch.bfloat16)
    counts = torch.tensor(COUNTS, device=DEVICE)
    with never_waiting():
        output = grouped_linear(rows, weight, counts)
        output.backward(torch.ones_like(output))
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("unused", [0, 3])
@either_dtype
def test_the_combine_adds_up_every_tokens_rows(setting, poisoned_memory, dtype, unused):
    routing_map = torch.rand(T, E, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.3
    routing_map[4] = False  # a token without an expert
    num_rows = int(routing_map.sum())
    order = permute.order_rows(routing_map, num_rows + unused, all_used=not unused)
    assert order.end_T is not None  # no scatter, which is the CPU's way
    rows = normal(num_rows + unused, D, dtype=dtype).detach()
    rows[num_rows:] = torch.nan
    want = torch.zeros(T, D, dtype=torch.float64, device=DEVICE)
    want.index_add_(0, order.token_R[:num_rows], rows[:num_rows].double())
    with poisoned_memory():
        got = permute.unpermute(rows, order)
    assert got.dtype == dtype
    assert_close(got, want)
    assert not got[4].any()
    assert torch.equal(got, permute.unpermute(rows, order))
