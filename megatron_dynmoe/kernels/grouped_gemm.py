"""Triton: one GEMM per expert over rows that are ordered by expert.

These kernels are for cases in which ``torch.nn.functional.grouped_mm`` has no kernel of its own
(Ampere GPUs, and float32), and for what it cannot do: to gather the rows of a weight's gradient,
and to add that gradient to what is there. The counts stay on the device, so the host does not know
the number of tiles. The grid therefore has a program for every tile that there could be, and a
program without rows returns at once. Column tiles are numbered first, so that an expert's weight
stays in the L2 cache while its rows pass once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_dynmoe.kernels.operators import operator
from megatron_dynmoe.kernels.tiles import Grid, Way, launch, situation, tiled

WAYS = (
    Way(128, 128, 32, warps=8, stages=3),
    Way(128, 128, 64, warps=8, stages=3),
    Way(128, 256, 64, warps=8, stages=3, since=90),
    Way(64, 128, 64, warps=4, stages=4),
    Way(64, 256, 32, warps=4, stages=4),
)
# A weight's gradient that is added to another one needs more registers.
GRADIENT_WAYS = (Way(128, 64, 32, warps=8, stages=3), *WAYS[:2], WAYS[3])


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
    multiply_each_row(rows_RI, weight_EIO, output_RO, ends_E)
    return output_RO


@operator("output_RO")
def multiply_each_row(
    rows_RI: Tensor, weight_EIO: Tensor, output_RO: Tensor, ends_E: Tensor
) -> None:
    """Launch the kernel of :func:`multiply_rows`."""
    num_experts, inner, columns = weight_EIO.shape
    if not len(rows_RI):
        return
    launch(
        _multiply_rows, tiles_of_rows(len(rows_RI), num_experts, columns),
        rows_RI, weight_EIO, output_RO, ends_E,
        num_experts, inner, columns, *rows_RI.stride(), *weight_EIO.stride(),
        situation(len(rows_RI)), WIDTH=triton.next_power_of_2(num_experts), **dot_of(rows_RI),
    )  # fmt: skip


def multiply_by_rows(
    left_RO: Tensor,
    right_RI: Tensor,
    ends_E: Tensor,
    left_row_R: Tensor | None = None,
    right_row_R: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """Sum ``left[r]^T right[r]`` over the rows of each expert; this is a weight's gradient.

    Args:
        left_RO: [R, O], floating, the rows of expert 0 first.
        right_RI: [R, I], the same dtype.
        ends_E: [E] int32, the index after each expert's last row; at most R.
        left_row_R: [R] int64, if given: row r lies there in ``left_RO``, which may have any length.
        right_row_R: the same for ``right_RI``.
        add_to: [E, O, I], contiguous, any floating dtype, to which the sums are added.

    Returns:
        ``add_to``, or [E, O, I], zero for an expert without rows.
    """
    output_EOI = add_to
    if output_EOI is None:
        output_EOI = left_RO.new_empty(len(ends_E), left_RO.shape[1], right_RI.shape[1])
    adds = add_to is not None
    multiply_all_rows(left_RO, right_RI, output_EOI, ends_E, left_row_R, right_row_R, adds)
    return output_EOI


@operator("output_EOI")
def multiply_all_rows(
    left_RO: Tensor, right_RI: Tensor, output_EOI: Tensor, ends_E: Tensor,
    left_row_R: Tensor | None, right_row_R: Tensor | None, adds: bool,
) -> None:  # fmt: skip
    """Launch the kernel of :func:`multiply_by_rows`."""
    height, width = left_RO.shape[1], right_RI.shape[1]
    num_rows = len(right_RI if right_row_R is None else right_row_R)
    if not num_rows:
        if not adds:
            output_EOI.zero_()
        return

    def grid(tile: dict[str, Any]) -> tuple[int, ...]:
        lines = triton.cdiv(height, tile["TILE_ROWS"])
        return triton.cdiv(width, tile["TILE_COLUMNS"]), lines, len(ends_E)

    launch(
        _multiply_by_rows, grid,
        left_RO, right_RI, output_EOI, ends_E, left_row_R, right_row_R,
        height, width, *left_RO.stride(), *right_RI.stride(), situation(num_rows),
        ADDS=adds, **dot_of(left_RO),
    )  # fmt: skip


@register_flop_formula(multiply_each_row)
def _flops(rows_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    """FLOPs of [R, I] times [E, I, O], an expert a row."""
    return 2 * rows_shape[0] * rows_shape[1] * weight_shape[-1]


@register_flop_formula(multiply_all_rows)
def _flops_of_gradient(
    left_shape: Any, right_shape: Any, output: Any, ends: Any, left_row: Any, *_: Any, **__: Any
) -> int:
    """FLOPs of [R, O] times [R, I]; one of them at most is gathered."""
    rows = right_shape[0] if left_row else left_shape[0]
    return 2 * rows * left_shape[1] * right_shape[1]


def tiles_of_rows(num_rows: int, num_experts: int, columns: int) -> Grid:
    """A grid with a program for each tile that there could be; see :func:`tile_of`."""

    def grid(tile: dict[str, Any]) -> tuple[int, ...]:
        # Every expert may have a tile that is not full. Axis 0 may be the longest.
        of_rows = triton.cdiv(num_rows, tile["TILE_ROWS"]) + num_experts
        return (of_rows * triton.cdiv(columns, tile["TILE_COLUMNS"]),)

    return grid


def dot_of(values: Tensor) -> dict[str, Any]:
    """Choose the precision of products; float32 follows PyTorch's own setting for TF32."""
    tf32 = torch.backends.cuda.matmul.allow_tf32 and values.dtype == torch.float32
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        # Triton's interpreter, which runs on the CPU, reads the bits of a bf16 as an integer.
        "WIDEN": not values.is_cuda,
    }


@triton.jit
def add_product(total, left, right, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """``total + left @ right`` in float32."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def tile_of(
    ends_ptr, num_experts, columns,
    WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find this program's tile: expert (or ``num_experts``: none), first row, end, first column."""
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    tile = tl.program_id(0) // column_tiles
    first_column = (tl.program_id(0) % column_tiles * TILE_COLUMNS).to(tl.int64)
    experts = tl.arange(0, WIDTH)
    exists = experts < num_experts
    ends = tl.load(ends_ptr + experts, mask=exists, other=0)
    starts = tl.load(ends_ptr + experts - 1, mask=exists & (experts > 0), other=0)
    tiles = tl.where(exists, (ends - starts + TILE_ROWS - 1) // TILE_ROWS, 0)
    is_before = exists & (tl.cumsum(tiles, axis=0) <= tile)
    expert = tl.sum(is_before.to(tl.int32), axis=0)
    # Rows before this expert's tile, whose own tiles may not be full.
    is_expert = experts == expert
    start = tl.sum(tl.where(is_expert, starts, 0), axis=0)
    end = tl.sum(tl.where(is_expert, ends, 0), axis=0)
    tiles_before = tl.sum(tl.where(is_before, tiles, 0), axis=0)
    first_row = (start + (tile - tiles_before) * TILE_ROWS).to(tl.int64)
    return expert, first_row, end, first_column


@tiled("inner", "columns", ways=WAYS)
@triton.jit
def _multiply_rows(
    rows_ptr, weight_ptr, output_ptr, ends_ptr,
    num_experts, inner, columns, row_step, row_column_step,
    weight_expert_step, weight_inner_step, weight_column_step, situation,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_INNER: tl.constexpr,
):  # fmt: skip
    expert, first_row, end, first_column = tile_of(
        ends_ptr, num_experts, columns, WIDTH, TILE_ROWS, TILE_COLUMNS
    )
    if expert >= num_experts:
        return
    row = tl.arange(0, TILE_ROWS)[:, None]
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    place = tl.arange(0, TILE_INNER)
    is_row, is_column = row < end - first_row, column < columns - first_column
    # Only a tile's first place takes 64 bits: those of all its values would not fit into the
    # registers.
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
        total = add_product(total, left, right, PRECISION, WIDEN)
        left_ptrs += TILE_INNER * row_column_step
        right_ptrs += TILE_INNER * weight_inner_step
    output_ptr += first_row * columns + first_column
    total = total.to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + row * columns + column, total, is_row & is_column)


@tiled("height", "width", "ADDS", ways=GRADIENT_WAYS, changes="output_ptr")
@triton.jit
def _multiply_by_rows(
    left_ptr, right_ptr, output_ptr, ends_ptr, left_index_ptr, right_index_ptr,
    height, width, left_row_step, left_column_step, right_row_step, right_column_step, situation,
    ADDS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_INNER: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    line = (tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS))[:, None]
    column = (tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS))[None, :]
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for at in range(start, end, TILE_INNER):
        row = (at + tl.arange(0, TILE_INNER)).to(tl.int64)
        left_row, right_row = row, row
        if left_index_ptr is not None:
            left_row = tl.load(left_index_ptr + row, mask=row < end, other=0)
        if right_index_ptr is not None:
            right_row = tl.load(right_index_ptr + row, mask=row < end, other=0)
        left = tl.load(
            left_ptr + left_row[None, :] * left_row_step + line * left_column_step,
            mask=(row[None, :] < end) & (line < height),
            other=0.0,
        )
        right = tl.load(
            right_ptr + right_row[:, None] * right_row_step + column * right_column_step,
            mask=(row[:, None] < end) & (column < width),
            other=0.0,
        )
        total = add_product(total, left, right, PRECISION, WIDEN)
    output_ptrs = output_ptr + expert.to(tl.int64) * height * width + (line * width + column)
    inside = (line < height) & (column < width)
    if ADDS:
        total += tl.load(output_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptrs, total.to(output_ptr.dtype.element_ty), inside)
