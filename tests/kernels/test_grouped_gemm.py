"""The grouped GEMM against float64 products, expert by expert."""

import pytest
import torch

from tests.kernels.device import DEVICE

pytest.importorskip("triton")
from megatron_dynmoe.kernels import grouped_gemm
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


@pytest.mark.parametrize("gathers", ["left", "right"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_a_weights_gradient_gathers_one_of_its_sides(counts, dtype, gathers):
    num_rows, num_tokens = sum(counts), 7
    token_R = torch.arange(num_rows, device=DEVICE).mul(3).remainder(num_tokens)
    tokens, rows = normal(num_tokens, 24, dtype=dtype), normal(num_rows, 140, dtype=dtype)
    if gathers == "left":
        got = multiply_by_rows(tokens, rows, ends_of(counts), left_row_R=token_R)
        want = multiply_by_rows(tokens[token_R], rows, ends_of(counts))
    else:
        got = multiply_by_rows(rows, tokens, ends_of(counts), right_row_R=token_R)
        want = multiply_by_rows(rows, tokens[token_R], ends_of(counts))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weights_gradient_is_added_to_a_buffer_in_the_buffers_precision(dtype):
    counts = [3, 0, 150]
    left, right = normal(153, 24, dtype=dtype), normal(153, 40, dtype=dtype)
    before = normal(3, 24, 40, dtype=torch.float32)
    buffer = before.clone()
    assert multiply_by_rows(left, right, ends_of(counts), add_to=buffer) is buffer
    parts = zip(left.double().split(counts), right.double().split(counts), strict=True)
    # Not rounded to the rows' dtype in between.
    assert_close(buffer, torch.stack([one.T @ other for one, other in parts]) + before.double())
    assert torch.equal(buffer[1], before[1])


def test_every_way_to_cut_into_tiles_gives_the_same_products(monkeypatch):
    counts = [3, 0, 128, 150]
    rows, weight = normal(281, 70, dtype=torch.float32), normal(4, 70, 300, dtype=torch.float32)
    right = normal(281, 300, dtype=torch.float32)
    parts = list(rows.double().split(counts))
    product = torch.cat([part @ weight[expert].double() for expert, part in enumerate(parts)])
    rights = right.double().split(counts)
    gradient = torch.stack([one.T @ other for one, other in zip(parts, rights, strict=True)])
    for way in {*grouped_gemm.WAYS, *grouped_gemm.GRADIENT_WAYS}:
        for kernel in (grouped_gemm._multiply_rows, grouped_gemm._multiply_by_rows):
            monkeypatch.setattr(kernel, "configs", [way.config])
        assert_close(multiply_rows(rows, weight, ends_of(counts)), product)
        assert_close(multiply_by_rows(rows, right, ends_of(counts)), gradient)


def test_rows_beyond_the_last_expert_are_not_read():
    counts, beyond = [3, 5], 200
    rows = normal(8, 16, dtype=torch.float32)
    padded = torch.cat([rows, rows.new_full((beyond, 16), torch.nan)])
    weight = normal(2, 16, 12, dtype=torch.float32)
    ends = ends_of(counts)
    assert torch.equal(multiply_rows(padded, weight, ends)[:8], multiply_rows(rows, weight, ends))
    assert torch.equal(multiply_by_rows(padded, padded, ends), multiply_by_rows(rows, rows, ends))
