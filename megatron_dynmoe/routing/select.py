"""Top-p selection: how many experts a token uses, which ones, and with what weight."""

import numpy as np
import torch
from torch import Tensor

# Cumulative probabilities are sums of 64-bit integers in units of 2**-60. Such a sum is exact in
# any order, so every implementation of this rule, whatever its order of summation, agrees on every
# token; a float32 probability above 2**-37 is represented without loss.
FIXED_POINT_BITS = 60
NEVER_EXCEEDED = torch.iinfo(torch.int64).max


def select(probs_TE: Tensor, threshold: Tensor | float, max_experts: int | None = None) -> Tensor:
    """Choose each token's experts (Algorithm 1 of Dynamic MoE).

    Sort the probabilities in descending order, ties by expert index, and keep the shortest prefix
    whose sum exceeds the threshold (strictly). At least one expert; all where the sum never exceeds
    it, as for a threshold of 1 or more; at most ``max_experts``. A row of NaN gets the first
    expert, so that a run that has gone wrong ends in Megatron's check and not out of memory.

    Args:
        probs_TE: [T, E], float32 or float64, rows summing to 1.
        threshold: a number or a tensor of one element, taken in the dtype of ``probs_TE``.
        max_experts: the cap, or None.

    Returns:
        The routing map [T, E], bool. Not differentiable: gradients flow through the weights.
    """
    return select_and_count(probs_TE, threshold, max_experts)[0]


@torch.no_grad()
def select_and_count(
    probs_TE: Tensor, threshold: Tensor | float, max_experts: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`select`, and the number of experts of each token.

    Only the values are sorted: sums do not depend on the order of equal values, so they tell how
    many experts a token uses and the least probability among them. A comparison with that gives
    the map, except where the next probability is equal.

    Returns:
        The routing map [T, E], bool, and the experts of each token [T], int64.
    """
    num_experts = probs_TE.shape[-1]
    limit = fixed_point_threshold(threshold, probs_TE)
    on_cpu = _is_plain_cpu(probs_TE)
    ascending_TE = _sort(probs_TE.detach(), on_cpu)
    experts_T1 = _count(ascending_TE, limit, max_experts, on_cpu)
    least_prob_T1 = ascending_TE.gather(-1, num_experts - experts_T1)
    if not on_cpu:  # a device need not wait for its host to hear which rows are special
        return _map_with_ties(probs_TE, least_prob_T1, experts_T1), experts_T1.squeeze(-1)
    map_TE = probs_TE >= least_prob_T1
    next_T1 = ascending_TE.gather(-1, (num_experts - 1 - experts_T1).clamp(min=0))
    is_tie_T1 = (next_T1 == least_prob_T1) & (experts_T1 < num_experts)
    rows = (is_tie_T1 | least_prob_T1.isnan()).squeeze(-1).nonzero().squeeze(-1)
    if len(rows):
        map_TE[rows] = _map_with_ties(probs_TE[rows], least_prob_T1[rows], experts_T1[rows])
    return map_TE, experts_T1.squeeze(-1)


def weigh(probs_TE: Tensor, routing_map_TE: Tensor, renormalize: bool) -> Tensor:
    """Weights of the selected experts, zero elsewhere.

    Raw probabilities (equation 4 of Dynamic MoE), or renormalised over the selected set so that
    they sum to 1 (DTop-p).

    Args:
        probs_TE: [T, E].
        routing_map_TE: [T, E], bool, at least one True a row.
        renormalize: which of the two.

    Returns:
        [T, E], dtype of ``probs_TE``, differentiable in it.
    """
    weights_TE = probs_TE * routing_map_TE
    if renormalize:
        weights_TE = weights_TE / weights_TE.sum(dim=-1, keepdim=True)
    return weights_TE


def fixed_point_threshold(threshold: Tensor | float, probs_TE: Tensor) -> Tensor:
    """The threshold in units of 2**-60, int64; below 0 for NaN, which no sum stays within."""
    threshold = torch.as_tensor(threshold, dtype=probs_TE.dtype, device=probs_TE.device)
    units = _fixed_point(threshold.nan_to_num(nan=-1).clamp(min=-1, max=1))
    return torch.where(threshold >= 1, NEVER_EXCEEDED, units)


def _fixed_point(values: Tensor) -> Tensor:
    return (values * 2.0**FIXED_POINT_BITS).long()  # a power of two: exact in float32 too


def _is_plain_cpu(values: Tensor) -> bool:
    return values.is_cpu and type(values) is Tensor and not torch.compiler.is_compiling()


def _sort(values: Tensor, on_cpu: bool) -> Tensor:
    """Ascending along the last dimension, NaN last.

    NumPy sorts short rows with vector instructions: 16384 rows of 64 in 2 ms, PyTorch's sort takes
    40 ms and its topk of 8 takes 17 ms (one core of a Xeon with AVX-512).
    """
    if on_cpu:
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def _count(ascending_TE: Tensor, limit: Tensor, max_experts: int | None, on_cpu: bool) -> Tensor:
    """Experts of each token, [T, 1] int64, from its sorted probabilities."""
    num_experts = ascending_TE.shape[-1]
    width = most = min(num_experts, max_experts or num_experts)
    if on_cpu:  # most tokens need the sums of few experts
        width = min(most, max(16, num_experts // 4))
    experts_T1 = _count_among(ascending_TE[:, num_experts - width :], limit)
    if width < most:
        rows = (experts_T1 > width).squeeze(-1).nonzero().squeeze(-1)
        if len(rows):
            experts_T1[rows] = _count_among(ascending_TE[rows, num_experts - most :], limit)
    is_nan_T1 = ascending_TE[:, -1:].isnan()
    return experts_T1.clamp(max=most).masked_fill(is_nan_T1, 1)


def _count_among(ascending_TK: Tensor, limit: Tensor) -> Tensor:
    """The length of the shortest prefix whose sum exceeds the limit; K + 1 where none does."""
    sums_TK = _fixed_point(ascending_TK.flip(-1)).cumsum(dim=-1)
    limit_T1 = limit.expand(len(sums_TK), 1).contiguous()
    return torch.searchsorted(sums_TK, limit_T1, right=True) + 1


def _map_with_ties(probs_TE: Tensor, least_prob_T1: Tensor, experts_T1: Tensor) -> Tensor:
    """The map of rows in which the lowest indices among equal probabilities are to be chosen."""
    above_TE = probs_TE > least_prob_T1
    equal_TE = probs_TE == least_prob_T1
    room_T1 = experts_T1 - above_TE.sum(dim=-1, keepdim=True)
    map_TE = above_TE | (equal_TE & (equal_TE.cumsum(dim=-1) <= room_T1))
    map_TE[:, :1] |= least_prob_T1.isnan()
    return map_TE
