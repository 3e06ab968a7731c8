"""From tokens to rows by expert and back, for any number of experts per token.

A row is one token at one expert. Rows are ordered by expert, and by token within an expert. If
there is room for more rows than were routed, the unused rows come last. Their content is arbitrary,
and neither a sum nor a gradient reads it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dynmoe import kernels


class RowOrder(NamedTuple):
    """The token and the expert of each of the R rows of a routing map [T, E]."""

    token_R: Tensor  # int64; T for an unused row
    weight_R: Tensor  # int64, index into the flat weights, token * E + expert; T * E if unused
    num_tokens: int
    all_used: bool
    # The rows of token 0, then those of token 1, and so on; and the index after each token's last
    # row. Both are None on a CPU, where rows are scattered.
    row_of_slot: Tensor | None
    end_T: Tensor | None


def order_rows(map_TE: Tensor, num_rows: int, all_used: bool = True) -> RowOrder:
    """List the rows of a routing map.

    Args:
        map_TE: [T, E], bool.
        num_rows: R, the number of True entries, or an upper bound of it.
        all_used: False if ``num_rows`` is only an upper bound.
    """
    num_tokens, num_experts = map_TE.shape
    if kernels.available(map_TE.device):
        from megatron_dynmoe.kernels.permute import order_by_expert

        token_R, weight_R, row_of_slot, end_T = order_by_expert(map_TE, num_rows, all_used)
        return RowOrder(token_R, weight_R, num_tokens, all_used, row_of_slot, end_T)
    by_expert = map_TE.t().reshape(-1)
    if map_TE.is_cpu and all_used:
        flat_R = by_expert.nonzero().squeeze(-1)
    else:  # the size is given, so the host does not wait for the device
        flat_R = torch.nonzero_static(by_expert, size=num_rows).squeeze(-1)
    token_R, expert_R = flat_R % num_tokens, flat_R // num_tokens
    weight_R = token_R * num_experts + expert_R
    if not all_used:
        unused_R = flat_R < 0  # nonzero_static fills up with -1
        token_R = token_R.masked_fill(unused_R, num_tokens)
        weight_R = weight_R.masked_fill(unused_R, map_TE.numel())
    slots = (None, None) if scatters_in_order(map_TE.device) else _by_token(map_TE, token_R)
    return RowOrder(token_R, weight_R, num_tokens, all_used, *slots)


def fit_rows(map_TE: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Leave out the last tokens of a routing map with more rows than there is room for.

    Args:
        map_TE: [T, E], bool, at least one token.
        num_rows: the room.

    Returns:
        The map, unchanged if it fits, and whether it does not, scalar bool on the device.
    """
    end_T = map_TE.sum(dim=-1).cumsum(dim=0)
    return map_TE & (end_T <= num_rows).unsqueeze(-1), end_T[-1] > num_rows


def scatters_in_order(device: torch.device) -> bool:
    """Whether ``scatter_add_`` adds in a fixed order there."""
    return device.type == "cpu"


def _by_token(map_TE: Tensor, token_R: Tensor) -> tuple[Tensor, Tensor]:
    return token_R.argsort(stable=True), map_TE.sum(dim=-1).cumsum(dim=0)


def permute(tokens_TD: Tensor, weights_TE: Tensor, order: RowOrder) -> tuple[Tensor, Tensor]:
    """Gather the rows and their weights.

    Args:
        tokens_TD: [T, D], any floating dtype.
        weights_TE: [T, E], any floating dtype.

    Returns:
        [R, D] and [R], differentiable in tokens and weights. The gradients of a token's rows are
        added in a fixed order, without atomics; on CUDA in float32.
    """
    return _Gather.apply(tokens_TD, order), weights_of(weights_TE, order)


def weights_of(weights_TE: Tensor, order: RowOrder) -> Tensor:
    """Gather the rows' weights, [R], with a gradient; see :func:`permute`."""
    weights = weights_TE.reshape(-1)
    if not order.all_used:  # the gradients of unused rows go to one extra element
        weights = torch.nn.functional.pad(weights, (0, 1))
    return weights.index_select(0, order.weight_R)


def unpermute(rows_RD: Tensor, order: RowOrder) -> Tensor:
    """Sum each token's rows, [T, D], dtype of the rows; the transpose of :func:`permute`."""
    return _Sum.apply(rows_RD, order)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return rows_of(tokens_TD, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_RD: Tensor) -> tuple[Tensor, None]:
        return sums_of(d_rows_RD, ctx.order), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return sums_of(rows_RD, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sums_TD: Tensor) -> tuple[Tensor, None]:
        return rows_of(d_sums_TD, ctx.order), None


def rows_of(tokens_TD: Tensor, order: RowOrder) -> Tensor:
    """Gather the rows, [R, D], without a gradient; see :func:`permute`."""
    token_R = order.token_R if order.all_used else order.token_R.clamp(max=order.num_tokens - 1)
    return tokens_TD.index_select(0, token_R)


def sums_of(rows_RD: Tensor, order: RowOrder) -> Tensor:
    """Sum each token's rows, [T, D], without a gradient; see :func:`unpermute`."""
    if order.row_of_slot is None:
        sums_TD = rows_RD.new_zeros(order.num_tokens + (not order.all_used), rows_RD.shape[1])
        sums_TD.scatter_add_(0, order.token_R.unsqueeze(-1).expand_as(rows_RD), rows_RD)
        return sums_TD[: order.num_tokens]
    assert order.end_T is not None
    if kernels.available(rows_RD.device) and rows_RD.dtype != torch.float64:
        from megatron_dynmoe.kernels.permute import sum_rows

        return sum_rows(rows_RD, order.row_of_slot, order.end_T)
    lengths_T = order.end_T.diff(prepend=order.end_T.new_zeros(1))
    by_token_RD = rows_RD.index_select(0, order.row_of_slot)
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    # unsafe=True skips a check of the lengths on the host; they are right by construction
    sums_TD = torch.segment_reduce(by_token_RD.to(wide), "sum", lengths=lengths_T, unsafe=True)
    return sums_TD.to(rows_RD.dtype)
