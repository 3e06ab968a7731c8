"""Triton: one GEMM per expert over rows that are ordered by expert.

These kernels are for cases in which ``torch.nn.functional.grouped_mm`` has no kernel of its own:
Ampere GPUs, and float32. The counts stay on the device, so the host does not know the number of
tiles. The grid therefore has a program for every tile that there could be, and a program without
rows returns at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_dynmoe.kernels.operators import operator

TILE_ROWS, TILE_COLUMNS, TILE_INNER = 128, 128, 32


def multiply_rows(rows_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the rows of each expert by the expert's weight.

    Args:
        rows_RI: [R, I], floating, the rows of expert 0 first.
        weight_EIO: [E, I, O], dtype of the rows, in any order of strides.
        ends_E: [E] int32, the index after each expert's last row; at most R.

    Returns:
        [R, O], contiguous. Rows after those of the last expert are not written.
    """
    output_RO = rows_RI.new_empty(len(rows_RI), weight_EIO.shape[2])
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    tile_ends_E = ((counts_E + TILE_ROWS - 1) // TILE_ROWS).cumsum(0).int()
    multiply_each_row(rows_RI, weight_EIO, output_RO, ends_E, tile_ends_E)
    return output_RO


@operator("output_RO")
def multiply_each_row(
    rows_RI: Tensor, weight_EIO: Tensor, output_RO: Tensor, ends_E: Tensor, tile_ends_E: Tensor
) -> None:
    """Launch the kernel of :func:`multiply_rows`.

    Args:
        tile_ends_E: [E] int32, the index after each expert's last tile.
    """
    num_experts, inner, columns = weight_EIO.shape
    grid = (
        triton.cdiv(len(rows_RI), TILE_ROWS) + num_experts,
        triton.cdiv(columns, TILE_COLUMNS),
    )
    _multiply_rows[grid](
        rows_RI, weight_EIO, output_RO, ends_E, tile_ends_E,
        num_experts, inner, columns, *rows_RI.stride(), *weight_EIO.stride(),
        WIDTH=triton.next_power_of_2(num_experts), **_dot_of(rows_RI),
        TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, TILE_INNER=TILE_INNER, num_warps=8,
    )  # fmt: skip


def multiply_by_rows(left_RO: Tensor, right_RI: Tensor, ends_E: Tensor) -> Tensor:
    """Sum ``left[r]^T right[r]`` over the rows of each expert; this is a weight's gradient.

    Args:
        left_RO: [R, O], floating, the rows of expert 0 first.
        right_RI: [R, I], the same dtype.
        ends_E: [E] int32, the index after each expert's last row; at most R.

    Returns:
        [E, O, I], zero for an expert without rows.
    """
    output_EOI = left_RO.new_empty(len(ends_E), left_RO.shape[1], right_RI.shape[1])
    multiply_all_rows(left_RO, right_RI, output_EOI, ends_E)
    return output_EOI


@operator("output_EOI")
def multiply_all_rows(
    left_RO: Tensor, right_RI: Tensor, output_EOI: Tensor, ends_E: Tensor
) -> None:
    """Launch the kernel of :func:`multiply_by_rows`."""
    height, width = left_RO.shape[1], right_RI.shape[1]
    grid = (len(ends_E), triton.cdiv(height, TILE_ROWS), triton.cdiv(width, TILE_COLUMNS))
    _multiply_by_rows[grid](
        left_RO, right_RI, output_EOI, ends_E,
        height, width, *left_RO.stride(), *right_RI.stride(), **_dot_of(left_RO),
        TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, TILE_INNER=TILE_INNER, num_warps=8,
    )  # fmt: skip


@register_flop_formula([multiply_each_row, multiply_all_rows])
def _flops(left_shape: Any, right_shape: Any, *_: Any, **__: Any) -> int:
    """FLOPs of [R, I] times [E, I, O], an expert a row, or of [R, O] times [R, I]."""
    return 2 * left_shape[0] * left_shape[1] * right_shape[-1]


def _dot_of(values: Tensor) -> dict[str, Any]:
    """Choose the precision of products; float32 follows PyTorch's own setting for TF32."""
    tf32 = torch.backends.cuda.matmul.allow_tf32 and values.dtype == torch.float32
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        # Triton's interpreter, which runs on the CPU, reads the bits of a bf16 as an integer.
        "WIDEN": not values.is_cuda,
    }


@triton.jit
def _add_product(total, left, right, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _multiply_rows(
    rows_ptr, weight_ptr, output_ptr, ends_ptr, tile_ends_ptr,
    num_experts, inner, columns, row_step, row_column_step,
    weight_expert_step, weight_inner_step, weight_column_step,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_INNER: tl.constexpr,
):  # fmt: skip
    # 1. Find the expert of this tile; tiles are numbered expert by expert
    tile = tl.program_id(0)
    experts = tl.arange(0, WIDTH)
    exists = experts < num_experts
    tile_ends = tl.load(tile_ends_ptr + experts, mask=exists, other=2147483647)
    expert = tl.sum((tile_ends <= tile).to(tl.int32), axis=0)
    if expert >= num_experts:
        return
    first_tile = tl.load(tile_ends_ptr + expert - 1, mask=expert > 0, other=0)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    first_row = (start + (tile - first_tile) * TILE_ROWS).to(tl.int64)
    first_column = (tl.program_id(1) * TILE_COLUMNS).to(tl.int64)
    row = tl.arange(0, TILE_ROWS)[:, None]
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    place = tl.arange(0, TILE_INNER)
    is_row, is_column = row < end - first_row, column < columns - first_column
    # 2. Multiply. Only a tile's first place takes 64 bits: those of all its values would not fit
    # into the registers.
    left_ptrs = (
        rows_ptr + first_row * row_step + (row * row_step + place[None, :] * row_column_step)
    )
    right_ptrs = weight_ptr + expert.to(tl.int64) * weight_expert_step
    right_ptrs += first_column * weight_column_step
    right_ptrs += place[:, None] * weight_inner_step + column * weight_column_step
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for at in range(0, inner, TILE_INNER):
        left = tl.load(left_ptrs, mask=is_row & (place[None, :] < inner - at), other=0.0)
        right = tl.load(right_ptrs, mask=is_column & (place[:, None] < inner - at), other=0.0)
        total = _add_product(total, left, right, PRECISION, WIDEN)
        left_ptrs += TILE_INNER * row_column_step
        right_ptrs += TILE_INNER * weight_inner_step
    output_ptr += first_row * columns + first_column
    total = total.to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + row * columns + column, total, is_row & is_column)


@triton.jit
def _multiply_by_rows(
    left_ptr, right_ptr, output_ptr, ends_ptr,
    height, width, left_row_step, left_column_step, right_row_step, right_column_step,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_INNER: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    line = (tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS))[:, None]
    column = (tl.program_id(2) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS))[None, :]
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for at in range(start, end, TILE_INNER):
        row = (at + tl.arange(0, TILE_INNER)).to(tl.int64)
        left = tl.load(
            left_ptr + row[None, :] * left_row_step + line * left_column_step,
            mask=(row[None, :] < end) & (line < height),
            other=0.0,
        )
        right = tl.load(
            right_ptr + row[:, None] * right_row_step + column * right_column_step,
            mask=(row[:, None] < end) & (column < width),
            other=0.0,
        )
        total = _add_product(total, left, right, PRECISION, WIDEN)
    output_ptr += expert.to(tl.int64) * height * width
    inside = (line < height) & (column < width)
    tl.store(output_ptr + line * width + column, total.to(output_ptr.dtype.element_ty), inside)
