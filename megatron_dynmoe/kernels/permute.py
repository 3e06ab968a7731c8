"""Triton: the order of a routing map's rows, and the sum of each token's rows; without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dynmoe.kernels.operators import operator

BLOCK = 1024  # of the hidden size
ELEMENTS_PER_PROGRAM = 2048  # of a routing map


def order_by_expert(
    map_TE: Tensor, num_rows: int, all_used: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Number the True entries of a map: by expert, and by token within an expert.

    A row's number is a sum of counts, so that nothing is sorted or searched for.

    Args:
        map_TE: [T, E], bool.
        num_rows: R, the number of True entries, or an upper bound of it.
        all_used: False if ``num_rows`` is only an upper bound.

    Returns:
        The first four fields of :class:`megatron_dynmoe.moe.permute.RowOrder` but the numbers:
        ``token_R``, ``weight_R``, ``row_of_slot`` and ``end_T``, all int64. The last entries of
        ``row_of_slot`` are arbitrary if there are unused rows.
    """
    num_tokens, num_experts = map_TE.shape
    num_blocks = triton.cdiv(num_tokens, _tokens_per_program(num_experts))
    map_TE = map_TE.contiguous()
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=map_TE.device)
    experts_T = torch.empty(num_tokens, dtype=torch.int64, device=map_TE.device)
    token_R, weight_R, row_of_slot = (experts_T.new_empty(num_rows) for _ in range(3))
    if not all_used:
        token_R.fill_(num_tokens)
        weight_R.fill_(map_TE.numel())
    if map_TE.numel():
        count_chosen(map_TE, counts, experts_T)
    end_T = experts_T.cumsum(0)
    if map_TE.numel() and num_rows:
        number_rows(map_TE, counts.cumsum(0), end_T, token_R, weight_R, row_of_slot)
    return token_R, weight_R, row_of_slot, end_T


def _tokens_per_program(num_experts: int) -> int:
    return max(1, ELEMENTS_PER_PROGRAM // triton.next_power_of_2(num_experts))


@operator("counts", "experts_T")
def count_chosen(map_TE: Tensor, counts: Tensor, experts_T: Tensor) -> None:
    """Count the chosen of each expert in blocks of tokens, and of each token."""
    num_tokens, num_experts = map_TE.shape
    _count_chosen[(len(counts),)](
        map_TE, counts, experts_T, num_tokens, num_experts,
        BLOCK=_tokens_per_program(num_experts), WIDTH=triton.next_power_of_2(num_experts),
    )  # fmt: skip


@operator("token_R", "weight_R", "row_of_slot")
def number_rows(
    map_TE: Tensor, counted: Tensor, end_T: Tensor,
    token_R: Tensor, weight_R: Tensor, row_of_slot: Tensor,
) -> None:  # fmt: skip
    """Fill in the order; ``counted``, [blocks, E], are the counts up to the end of each block."""
    num_tokens, num_experts = map_TE.shape
    _number_rows[(len(counted),)](
        map_TE, counted, end_T, token_R, weight_R, row_of_slot,
        num_tokens, num_experts, len(counted),
        BLOCK=_tokens_per_program(num_experts), WIDTH=triton.next_power_of_2(num_experts),
    )  # fmt: skip


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


@triton.jit
def _chosen(map_ptr, num_tokens, num_experts, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Return the tokens of a block, its columns, and its part of the map as 0 and 1."""
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = (tokens < num_tokens)[:, None] & (columns < num_experts)[None, :]
    offsets = tokens[:, None] * num_experts + columns[None, :]
    return tokens, columns, tl.load(map_ptr + offsets, mask=inside, other=0).to(tl.int32)


@triton.jit
def _count_chosen(
    map_ptr, counts_ptr, experts_ptr, num_tokens, num_experts,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tokens, columns, chosen = _chosen(map_ptr, num_tokens, num_experts, BLOCK, WIDTH)
    counts = counts_ptr + tl.program_id(0).to(tl.int64) * num_experts + columns
    tl.store(counts, tl.sum(chosen, axis=0), mask=columns < num_experts)
    tl.store(experts_ptr + tokens, tl.sum(chosen, axis=1).to(tl.int64), mask=tokens < num_tokens)


@triton.jit
def _number_rows(
    map_ptr, counted_ptr, ends_ptr, token_ptr, weight_ptr, row_of_slot_ptr,
    num_tokens, num_experts, num_blocks, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tokens, columns, chosen = _chosen(map_ptr, num_tokens, num_experts, BLOCK, WIDTH)
    block = tl.program_id(0).to(tl.int64)
    real = columns < num_experts
    totals = tl.load(counted_ptr + (num_blocks - 1) * num_experts + columns, mask=real, other=0)
    before = tl.load(
        counted_ptr + (block - 1) * num_experts + columns, mask=real & (block > 0), other=0
    )
    first = tl.cumsum(totals, axis=0) - totals + before
    rows = first[None, :] + tl.cumsum(chosen, axis=0) - chosen
    ends = tl.load(ends_ptr + tokens, mask=tokens < num_tokens, other=0)
    starts = ends - tl.sum(chosen, axis=1)
    slots = starts[:, None] + tl.cumsum(chosen, axis=1) - chosen
    picked = chosen > 0
    here = tokens[:, None] + 0 * columns[None, :]
    tl.store(token_ptr + rows, here, mask=picked)
    tl.store(weight_ptr + rows, here * num_experts + columns[None, :], mask=picked)
    tl.store(row_of_slot_ptr + slots, rows.to(tl.int64), mask=picked)
