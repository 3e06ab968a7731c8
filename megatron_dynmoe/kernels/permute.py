"""Triton: the sum of each token's rows, in a fixed order and without atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_dynmoe.kernels.operators import operator

BLOCK = 1024  # of the hidden size


def sum_rows(rows_RD: Tensor, row_of_slot: Tensor, ends_T: Tensor) -> Tensor:
    """Add up every token's rows in float32, in the order in which they are listed.

    Args:
        rows_RD: [R, D], any floating dtype.
        row_of_slot: int64, the rows of token 0, then those of token 1, and so on.
        ends_T: [T] int64, the index in ``row_of_slot`` after each token's last row.

    Returns:
        [T, D], dtype of the rows; zero for a token without rows.
    """
    sums_TD = rows_RD.new_empty(len(ends_T), rows_RD.shape[1])
    if sums_TD.numel():
        add_rows(rows_RD.contiguous(), row_of_slot, ends_T, sums_TD)
    return sums_TD


@operator("sums_TD")
def add_rows(rows_RD: Tensor, row_of_slot: Tensor, ends_T: Tensor, sums_TD: Tensor) -> None:
    """Launch the kernel; arguments are those of :func:`sum_rows`, and its result."""
    width = rows_RD.shape[1]
    block = min(BLOCK, triton.next_power_of_2(width))
    grid = (len(ends_T), triton.cdiv(width, block))
    _sum_rows[grid](rows_RD, row_of_slot, ends_T, sums_TD, width, BLOCK=block)


@triton.jit
def _sum_rows(rows_ptr, row_of_slot_ptr, ends_ptr, sums_ptr, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start = tl.load(ends_ptr + token - 1, mask=token > 0, other=0)
    end = tl.load(ends_ptr + token)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(start, end):
        row = tl.load(row_of_slot_ptr + slot)
        total += tl.load(rows_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums_ptr + token * width + columns, total, mask=inside)
