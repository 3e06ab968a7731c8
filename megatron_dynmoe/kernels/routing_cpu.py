"""On a CPU: :func:`megatron_dynmoe.routing.route.route` in blocks, its gradient in closed form.

A block of tokens is so small that its temporaries stay in the processor's caches. With all tokens
at once, fresh memory for every temporary would cost more time than the arithmetic. NumPy sorts the
probabilities: on short rows it is 20 times faster than PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dynmoe.kernels.choose_cpu import number_in_units
from megatron_dynmoe.routing.normalize import EPSILON
from megatron_dynmoe.routing.route import Routing, check_positions
from megatron_dynmoe.routing.select import (
    FIXED_POINT_BITS,
    most_experts,
    select,
    threshold_in_units,
)

BLOCK_ELEMENTS = 1 << 18


def route_in_blocks(
    logits_TE: Tensor,
    threshold: Tensor | float,
    *,
    theta: Tensor | None = None,
    max_experts: int | None = None,
    renormalize: bool = False,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
) -> Routing:
    """Route; arguments, result and errors as for :func:`megatron_dynmoe.routing.route.route`."""
    check_positions(logits_TE, num_sequences)
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).contiguous()
    most_experts(logits_TE.shape[-1], max_experts)
    if isinstance(threshold, Tensor) and threshold.numel() == 1:
        threshold = threshold.item()  # in units of the sums as a number, not by seven calls
    return Routing(
        *_RouteInBlocks.apply(
            logits_TE, threshold, theta, max_experts, renormalize, num_sequences, valid_T
        )
    )


class _RouteInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        threshold: Tensor | float,
        theta: Tensor | None,
        max_experts: int | None,
        renormalize: bool,
        num_sequences: int,
        valid_T: Tensor | None,
    ) -> tuple[Tensor, ...]:
        num_tokens, num_experts = logits_TE.shape
        by_sequence = (-1, num_sequences, num_experts)
        weights_TE, probs_TE = torch.empty_like(logits_TE), torch.empty_like(logits_TE)
        # The gradient of renormalized weights needs only the weights themselves.
        chosen_TE = weights_TE if renormalize else torch.empty_like(logits_TE)
        map_TE = torch.empty_like(logits_TE, dtype=torch.bool)
        experts_T = torch.empty(num_tokens, dtype=torch.int64)
        standard_TE = torch.empty_like(logits_TE) if theta is not None else logits_TE
        scale_T1 = torch.empty_like(logits_TE[:, :1])
        prob_sums_BE = logits_TE.new_zeros(num_sequences, num_experts)
        assignments_BE = torch.zeros_like(prob_sums_BE, dtype=torch.int64)
        entropy = logits_TE.new_zeros(())
        not_finite = torch.zeros_like(entropy, dtype=torch.int64)
        for rows in _blocks(logits_TE, num_sequences):
            probs, weights = probs_TE[rows], weights_TE[rows]
            # The weights come last; until then their memory is scratch space, because fresh memory
            # would cost more time than the computation in it.
            scratch = weights
            scaled = logits_TE[rows]
            not_finite += _tokens_not_finite(scaled)
            if theta is not None:
                scale_T1[rows] = _standardize(scaled, out=standard_TE[rows])
                scaled = torch.mul(standard_TE[rows], theta, out=scratch)
            torch.softmax(scaled, dim=-1, out=probs)
            # A probability that has underflowed to 0 must not give log(0). It adds nothing to the
            # entropy.
            log_probs = torch.clamp(probs, min=torch.finfo(probs.dtype).tiny, out=scratch).log_()
            counted = probs if valid_T is None else probs * valid_T[rows].unsqueeze(-1)
            entropy -= torch.dot(counted.reshape(-1), log_probs.reshape(-1))
            prob_sums_BE += counted.view(by_sequence).sum(dim=0)

            selected, experts_T[rows] = _select_and_count(probs, threshold, max_experts)
            map_TE[rows] = selected
            torch.mul(probs, selected, out=weights)
            if renormalize:
                weights /= weights.sum(dim=-1, keepdim=True)
            else:
                chosen_TE[rows] = selected

            if valid_T is not None:
                selected = selected * valid_T[rows].unsqueeze(-1)
            # The sums are whole numbers, at most the tokens of a block, so below 2**24; float32
            # holds them exactly.
            assignments_BE += selected.view(by_sequence).sum(dim=0).long()
        ctx.save_for_backward(standard_TE, scale_T1, probs_TE, chosen_TE, theta, valid_T)
        ctx.renormalize = renormalize
        counts = assignments_BE, not_finite
        ctx.mark_non_differentiable(map_TE, experts_T, *counts)
        return weights_TE, map_TE, experts_T, prob_sums_BE, entropy, *counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_weights_TE: Tensor,
        _map: Any,
        _experts: Any,
        d_sums_BE: Tensor,
        d_entropy: Tensor,
        *_counts: Any,
    ) -> tuple[Tensor | None, ...]:
        standard_TE, scale_T1, probs_TE, chosen_TE, theta, valid_T = ctx.saved_tensors
        num_sequences, num_experts = d_sums_BE.shape
        d_logits_TE = torch.empty_like(probs_TE)
        d_theta = None if theta is None else torch.zeros_like(theta)
        for rows in _blocks(probs_TE, num_sequences):
            standard, probs = standard_TE[rows], probs_TE[rows]
            # 1. The gradient of the sums with respect to the probabilities. The entropy's gradient
            #    is -z plus a constant; the softmax's own backward pass removes the constant
            d_logits = d_logits_TE[rows]
            d_entropy_TE = standard * (-d_entropy if theta is None else -d_entropy * theta)
            d_probs = d_entropy_TE.view(-1, num_sequences, num_experts).add_(d_sums_BE)
            d_probs = d_probs.view_as(probs)
            if valid_T is not None:
                d_probs *= valid_T[rows].unsqueeze(-1)
            # 2. Weights: renormalized, they are a softmax over the selected experts
            if not ctx.renormalize:
                d_probs.addcmul_(d_weights_TE[rows], chosen_TE[rows])
            d_scaled = _softmax_backward(d_probs, probs, out=d_logits)
            if ctx.renormalize:
                d_scaled += _softmax_backward(d_weights_TE[rows], chosen_TE[rows], out=d_probs)
            # 3. Normalization. The gradient of a softmax sums to 0, so there is no mean to subtract
            if theta is not None:
                projection_T1 = torch.linalg.vecdot(d_scaled, standard).unsqueeze(-1)
                d_theta += projection_T1.sum()
                d_scaled.addcmul_(standard, projection_T1, value=-1 / num_experts)
                d_scaled *= scale_T1[rows] * theta
        return d_logits_TE, None, d_theta, None, None, None, None


def _blocks(values_TE: Tensor, num_sequences: int) -> list[slice]:
    """Slices of whole positions (one token of each sequence)."""
    num_tokens, num_experts = values_TE.shape
    step = max(1, BLOCK_ELEMENTS // (num_sequences * num_experts)) * num_sequences
    return [slice(start, start + step) for start in range(0, num_tokens, step)]


def _standardize(logits_TE: Tensor, out: Tensor) -> Tensor:
    """Write the normalized logits, not yet scaled by theta, to ``out``; return 1 / std, [T, 1]."""
    torch.sub(logits_TE, logits_TE.mean(dim=-1, keepdim=True), out=out)
    variance_T1 = torch.linalg.vecdot(out, out).unsqueeze(-1) / logits_TE.shape[-1]
    scale_T1 = torch.rsqrt(variance_T1 + EPSILON)
    torch.mul(out, scale_T1, out=out)
    return scale_T1


def _tokens_not_finite(logits_TE: Tensor) -> Tensor | int:
    """Count the tokens with a NaN or infinite logit; quick if the sum of all logits is finite."""
    if math.isfinite(logits_TE.sum().item()):
        return 0
    return (~logits_TE.isfinite().all(dim=-1)).sum()


def _select_and_count(
    probs_TE: Tensor, threshold: Tensor | float, max_experts: int | None
) -> tuple[Tensor, Tensor]:
    """:func:`megatron_dynmoe.routing.select.select`, and the experts of each token.

    Only the values are sorted, without their indices. That is enough: sums do not depend on the
    order of equal values, so the sorted values give the number of experts of a token and the least
    probability among them. The map then follows from a comparison with this least probability. If
    the next probability is equal (a tie), the comparison selects too many, and :func:`select`
    decides. NumPy sorts 16384 rows of 64 in 2 ms with vector instructions, PyTorch's sort takes
    40 ms and its topk of 8 takes 17 ms (one core of a Xeon with AVX-512).

    Returns:
        The map, [T, E], 1 for a selected expert and else 0, in the dtype of ``probs_TE`` because
        arithmetic with bool is slow on a CPU; and the number of experts of each token, [T] int64.
    """
    num_tokens, num_experts = probs_TE.shape
    values = probs_TE.numpy()
    # The bits of floats >= 0, read as unsigned integers, have the same order as the floats, and NaN
    # comes last. NumPy sorts integers faster, because it searches every row of floats for NaN.
    ascending_TE = np.sort(values.view(f"u{values.itemsize}"), axis=-1).view(values.dtype)
    if isinstance(threshold, float) and probs_TE.dtype == torch.float32:
        limit = number_in_units(threshold)
    else:
        limit = int(threshold_in_units(threshold, probs_TE))
    experts_T = _count(ascending_TE, limit, most_experts(num_experts, max_experts))
    # Read each token's least selected probability and the next smaller one. A token that uses all
    # experts has no next one: the value read instead belongs to a neighboring row. If that value
    # happens to be equal, the row is treated as a tie, which costs time but changes no result.
    place_T = np.arange(1, num_tokens + 1) * num_experts - experts_T
    least_prob_T, next_T = (ascending_TE.take(places) for places in (place_T, place_T - 1))
    tie_or_nan_T = (next_T == least_prob_T) | np.isnan(least_prob_T)

    least_prob_T1 = torch.from_numpy(least_prob_T).unsqueeze(-1)
    selected_TE = torch.ge(probs_TE, least_prob_T1, out=torch.empty_like(probs_TE))
    rows = torch.from_numpy(np.flatnonzero(tie_or_nan_T))
    if len(rows):
        selected_TE[rows] = select(probs_TE[rows], threshold, max_experts).to(selected_TE.dtype)
    return selected_TE, torch.from_numpy(experts_T)


def _count(ascending_TE: np.ndarray, limit: int, most: int) -> np.ndarray:
    """Count the experts of each token, [T] int64, from its sorted probabilities."""
    sums_T = np.zeros(len(ascending_TE), dtype=np.int64)
    experts_T = np.ones_like(sums_T)
    unit = ascending_TE.dtype.type(2.0**FIXED_POINT_BITS)
    with np.errstate(invalid="ignore"):  # rows with NaN are set to 1 below
        for taken in range(1, most):
            sums_T += (ascending_TE[:, -taken] * unit).astype(np.int64)
            wants_more_T = sums_T <= limit
            if not wants_more_T.any():
                break
            experts_T += wants_more_T
    experts_T[np.isnan(ascending_TE[:, -1])] = 1
    return experts_T


def _softmax_backward(gradient: Tensor, output: Tensor, out: Tensor) -> Tensor:
    """``output * (gradient - sum(output * gradient))`` in one pass."""
    return torch.ops.aten._softmax_backward_data.out(
        gradient, output, -1, output.dtype, grad_input=out
    )
