"""``pytorch/permutation.py`` and its kernels, ``common/triton/permutation.py``.

A row is one token at one expert. Rows are ordered by expert, then by token. The *row map* of T
tokens and E experts is [T, 2 E + 1] int32: the last column is the number n of a token's rows, the
first n columns are its rows **from the last to the first**, and the n columns from E on are the
experts of these rows. The order matters, because the kernels add a token's rows in it. The other
entries are not written; here they are -1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..not_stood_for import NotStoodFor
from .device import check_on_device


def moe_permute(
    inp: Tensor,
    routing_map: Tensor,
    num_out_tokens: int,
    max_token_num: int = -1,
    map_type: str = "mask",
) -> tuple[Tensor, Tensor]:
    """Gather the rows of tokens [T, D]: [R, D] and the row map.

    Args:
        routing_map: [T, E], bool or whole numbers 0 and 1.
        num_out_tokens: R, at least 1. Rows beyond those that are routed are uninitialized.
    """
    if map_type != "mask":
        raise NotStoodFor(f"map_type {map_type}")
    rows, _, row_map = _permute(inp, None, routing_map, num_out_tokens)
    return rows, row_map


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`moe_permute`, and gather the weights [T, E]: rows, weights [R], row map.

    A row whose weight is exactly 0 becomes zero, as if it were padding.
    """
    return _permute(inp, probs, routing_map, num_out_tokens)


def moe_permute_and_pad_with_probs(*args: Any, **kwargs: Any) -> Any:
    """Only for low precision, whose rows are padded to a multiple per expert."""
    raise NotStoodFor("moe_permute_and_pad_with_probs")


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
    pad_offsets: Tensor | None = None,
) -> Tensor:
    """Add up each token's rows in float32, in the row map's order; [T, D] as ``restore_shape``.

    Without any row the input is returned as it is, **without** tokens.
    """
    if map_type != "mask" or merging_probs is not None or probs is not None or pad_offsets:
        raise NotStoodFor("moe_unpermute with weights, padding or an index map")
    shape = inp.shape if restore_shape is None else restore_shape
    if not inp.numel():
        return inp.clone()
    return _Unpermute.apply(inp, row_id_map, shape[0])


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """Reorder chunks of rows: the i-th of the result is the ``sorted_index[i]``-th of the input."""
    return _sort_chunks(inp, None, split_sizes, sorted_index)[0]


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`moe_sort_chunks_by_index`, and the weights [R] with the rows."""
    rows, sorted_probs = _sort_chunks(inp, probs, split_sizes, sorted_index)
    assert sorted_probs is not None
    return rows, sorted_probs


def _permute(
    inp: Tensor, probs: Tensor | None, routing_map: Tensor, num_out_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``moe_permute_mask_map_forward``; its schema turns a count in a tensor into a number."""
    num_out_tokens = int(num_out_tokens)
    if not inp.numel():
        nothing = inp.new_empty(0)
        return inp.clone(), nothing, nothing
    check_on_device(inp=inp, routing_map=routing_map, probs=probs)
    if len(inp) != len(routing_map):
        raise ValueError(
            f"Permute not possible: inp.size(0) ({len(inp)}) must match routing_map.size(0) "
            f"({len(routing_map)})."
        )
    assert num_out_tokens > 0, (
        f"moe_permute (mask map) requires num_out_tokens > 0, got {num_out_tokens}."
    )
    num_routed = int(routing_map.sum())
    if num_routed > num_out_tokens:  # the kernel does not look, and writes beyond its buffer
        raise IndexError(f"{num_routed} rows are routed, and there is room for {num_out_tokens}")
    row_map = _row_map(routing_map.bool())
    rows, permuted_probs = _Permute.apply(inp, probs, row_map, num_out_tokens)
    return rows, permuted_probs, row_map


def _row_map(map_TE: Tensor) -> Tensor:
    """``make_row_id_map``."""
    num_experts = map_TE.shape[1]
    numbered = map_TE.t().reshape(-1).cumsum(0).sub_(1).view(num_experts, -1).t()
    rows, experts = numbered.masked_fill(~map_TE, -1).sort(dim=1, descending=True)
    experts = experts.masked_fill(rows < 0, -1)
    return torch.cat((rows, experts, map_TE.sum(1, keepdim=True)), dim=1).int()


def _parts(row_map: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and experts, [T, E] int64; -1 if a token has no further row."""
    num_experts = (row_map.shape[1] - 1) // 2
    return row_map[:, :num_experts].long(), row_map[:, num_experts:-1].long()


def _gather_rows(tokens: Tensor, row_map: Tensor, num_rows: int) -> Tensor:
    rows = _parts(row_map)[0]
    out = tokens.new_full((num_rows, tokens.shape[1]), torch.nan)
    token, slot = (rows >= 0).nonzero(as_tuple=True)
    out[rows[token, slot]] = tokens[token]
    return out


def _sum_rows(inp: Tensor, row_map: Tensor) -> Tensor:
    """``_unpermute_kernel``."""
    rows = _parts(row_map)[0]
    total = inp.new_zeros(len(rows), inp.shape[1], dtype=torch.float32)
    for slot in rows.unbind(1):
        total += torch.where((slot >= 0).unsqueeze(1), inp[slot.clamp(min=0)].float(), 0.0)
    return total.to(inp.dtype)


class _Permute(torch.autograd.Function):
    """``permute_with_mask_map``; its gradient is ``unpermute_with_mask_map``."""

    @staticmethod
    def forward(
        ctx: Any, inp: Tensor, probs: Tensor | None, row_map: Tensor, num_rows: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(row_map)
        ctx.shape = None if probs is None else probs.shape
        out = _gather_rows(inp, row_map, num_rows)
        if probs is None:
            return out, inp.new_empty(0)
        rows, experts = _parts(row_map)
        token, slot = (rows >= 0).nonzero(as_tuple=True)
        permuted = probs.new_full((num_rows,), torch.nan)
        permuted[rows[token, slot]] = probs[token, experts[token, slot]]
        out[permuted == 0] = 0
        return out, permuted

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_probs: Tensor) -> tuple[Tensor | None, ...]:
        (row_map,) = ctx.saved_tensors
        d_probs = None
        if ctx.shape is not None:
            rows, experts = _parts(row_map)
            token, slot = (rows >= 0).nonzero(as_tuple=True)
            d_probs = grad_probs.new_zeros(ctx.shape)
            d_probs[token, experts[token, slot]] = grad_probs[rows[token, slot]]
        return _sum_rows(grad, row_map), d_probs, None, None


class _Unpermute(torch.autograd.Function):
    """``unpermute_with_mask_map``; its gradient is ``permute_with_mask_map``."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, row_map: Tensor, num_tokens: int) -> Tensor:
        assert len(row_map) == num_tokens, "restore_shape has another number of tokens"
        ctx.save_for_backward(row_map)
        ctx.num_rows = len(inp)
        return _sum_rows(inp, row_map)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (row_map,) = ctx.saved_tensors
        return _gather_rows(grad, row_map, ctx.num_rows), None, None


def _sort_chunks(
    inp: Tensor, probs: Tensor | None, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor | None]:
    """``moe_chunk_sort_forward``: both lists are read by a kernel, so they are on the device."""
    if not inp.numel():
        return inp.clone(), None if probs is None else probs.clone()
    check_on_device(inp=inp, probs=probs, split_sizes=split_sizes, sorted_index=sorted_index)
    starts = split_sizes.cumsum(0) - split_sizes
    order = torch.cat(
        [
            torch.arange(int(starts[i]), int(starts[i] + split_sizes[i]), device=inp.device)
            for i in sorted_index.tolist()
        ]
    )
    if len(order) < len(inp):  # rows beyond the chunks stay where they are
        order = torch.cat((order, torch.arange(len(order), len(inp), device=inp.device)))
    return inp[order], None if probs is None else probs[order]
