"""From tokens to rows by expert and back, for any number of experts a token.

A row is one token at one expert; rows are ordered by expert, and by token within an expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dynmoe import kernels


class RowOrder(NamedTuple):
    """Which token and expert each of the R rows of a routing map [T, E] is for."""

    token_R: Tensor  # int64
    expert_R: Tensor  # int64
    num_tokens: int
    # The rows of token 0, then of token 1 ..., and where each token's end; None: not needed.
    row_of_slot: Tensor | None
    end_T: Tensor | None


def order_rows(map_TE: Tensor, num_rows: int) -> RowOrder:
    """The rows of a routing map.

    Args:
        map_TE: [T, E], bool.
        num_rows: how many are True in it.
    """
    num_tokens = len(map_TE)
    by_expert = map_TE.t().reshape(-1)
    if map_TE.is_cpu:
        flat_R = by_expert.nonzero().squeeze(-1)
    else:  # its size is known, so the host need not wait for the device
        flat_R = torch.nonzero_static(by_expert, size=num_rows).squeeze(-1)
    token_R, expert_R = flat_R % num_tokens, flat_R // num_tokens
    if not kernels.available(map_TE.device):
        return RowOrder(token_R, expert_R, num_tokens, None, None)
    return RowOrder(token_R, expert_R, num_tokens, *_by_token(map_TE, token_R))


def _by_token(map_TE: Tensor, token_R: Tensor) -> tuple[Tensor, Tensor]:
    return token_R.argsort(stable=True), map_TE.sum(dim=-1).cumsum(dim=0)


def permute(tokens_TD: Tensor, weights_TE: Tensor, order: RowOrder) -> tuple[Tensor, Tensor]:
    """The rows and their weights.

    Args:
        tokens_TD: [T, D], any floating dtype.
        weights_TE: [T, E], any floating dtype.

    Returns:
        [R, D] and [R], differentiable in both; gradients of a token's rows add up in a fixed order
        on CUDA and are sums of float32 there.
    """
    flat_R = order.token_R * weights_TE.shape[1] + order.expert_R
    return _Gather.apply(tokens_TD, order), weights_TE.reshape(-1).index_select(0, flat_R)


def unpermute(rows_RD: Tensor, order: RowOrder) -> Tensor:
    """Every token's sum of its rows, [T, D], dtype of the rows; the transpose of the above."""
    return _Sum.apply(rows_RD, order)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return tokens_TD.index_select(0, order.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_RD: Tensor):
        return _sum_rows(d_rows_RD, ctx.order), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return _sum_rows(rows_RD, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sums_TD: Tensor):
        return d_sums_TD.index_select(0, ctx.order.token_R), None


def _sum_rows(rows_RD: Tensor, order: RowOrder) -> Tensor:
    if order.row_of_slot is not None and rows_RD.dtype != torch.float64:
        from megatron_dynmoe.kernels.permute import sum_rows

        return sum_rows(rows_RD, order.row_of_slot, order.end_T)
    sums_TD = rows_RD.new_zeros(order.num_tokens, rows_RD.shape[1])
    return sums_TD.scatter_add_(0, order.token_R.unsqueeze(-1).expand_as(rows_RD), rows_RD)
