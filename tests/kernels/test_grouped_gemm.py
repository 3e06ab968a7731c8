"""The grouped GEMM against float64 products, expert by expert."""

import pytest
import torch

from megatron_dynmoe.moe import grouped_linear as gemms
from tests.kernels.device import DEVICE

pytest.importorskip("triton")
from megatron_dynmoe.kernels.grouped_gemm import multiply_by_rows, multiply_rows

pytestmark = [pytest.mark.megatron, pytest.mark.triton]

# Rows of each expert: none, a part of a tile, whole tiles, more than one tile.
COUNTS = [[3, 0, 128, 150], [0, 0, 0, 1], [129], [0, 0]]
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def ends_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0).int()


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = DTYPES[got.dtype] * want.abs().max().item() if want.numel() else 0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "columns"), [(40, 24), (1, 130), (33, 1)])
@pytest.mark.parametrize("counts", COUNTS)
def test_every_experts_rows_meet_its_weight(counts, inner, columns, dtype):
    rows = normal(sum(counts), inner, dtype=dtype)
    weight = normal(len(counts), columns, inner, dtype=dtype).transpose(1, 2)
    got = multiply_rows(rows, weight, ends_of(counts))
    want = [
        part.double() @ weight[expert].double() for expert, part in enumerate(rows.split(counts))
    ]
    assert got.dtype == dtype
    assert_close(got, torch.cat(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_a_weights_gradient_sums_over_its_experts_rows(counts, dtype):
    left, right = normal(sum(counts), 24, dtype=dtype), normal(sum(counts), 140, dtype=dtype)
    got = multiply_by_rows(left, right, ends_of(counts))
    parts = zip(left.double().split(counts), right.double().split(counts), strict=True)
    assert_close(got, torch.stack([one.T @ other for one, other in parts]))


def test_rows_beyond_the_last_expert_are_not_read():
    counts, beyond = [3, 5], 200
    rows = normal(8, 16, dtype=torch.float32)
    padded = torch.cat([rows, rows.new_full((beyond, 16), torch.nan)])
    weight = normal(2, 16, 12, dtype=torch.float32)
    ends = ends_of(counts)
    assert torch.equal(multiply_rows(padded, weight, ends)[:8], multiply_rows(rows, weight, ends))
    assert torch.equal(multiply_by_rows(padded, padded, ends), multiply_by_rows(rows, rows, ends))


def test_experts_run_by_it_where_there_is_no_grouped_mm(monkeypatch):
    counts = torch.tensor([3, 0, 130, 7], device=DEVICE)
    results = []
    for use in (False, True):
        monkeypatch.setattr(gemms, "uses_grouped_mm", lambda *_: False)
        monkeypatch.setattr(gemms.kernels, "available", lambda device, use=use: use)
        rows = normal(140, 24, dtype=torch.float32).requires_grad_()
        weight = normal(4, 16, 24, dtype=torch.float32).requires_grad_()
        output = gemms.grouped_linear(rows, weight, counts)
        output.square().sum().backward()
        results.append((output, rows.grad, weight.grad))
    assert type(output.grad_fn).__name__ == "_KernelLinearBackward"
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_float64_stays_with_the_loop_whose_sums_are_float64(monkeypatch):
    monkeypatch.setattr(gemms, "uses_grouped_mm", lambda *_: False)
    monkeypatch.setattr(gemms.kernels, "available", lambda device: True)
    rows, weight = normal(3, 5, dtype=torch.float64), normal(1, 7, 5, dtype=torch.float64)
    got = gemms.grouped_linear(rows, weight, torch.tensor([3], device=DEVICE))
    torch.testing.assert_close(got, rows @ weight[0].T, rtol=1e-14, atol=1e-14)
