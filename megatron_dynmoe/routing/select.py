"""Top-p selection: how many experts a token uses, which ones, and with what weight."""

import math

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

    Raises:
        ValueError: the probabilities are of another dtype, or the cap is below 1.
    """
    if probs_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"probabilities are {probs_TE.dtype}: use float32 or float64.")
    check_cap(max_experts)
    return select_and_count(probs_TE, threshold, max_experts)[0].bool()


@torch.no_grad()
def select_and_count(
    probs_TE: Tensor, threshold: Tensor | float, max_experts: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`select`, and the number of experts of each token.

    Only the values are sorted: sums do not depend on the order of equal values, so they tell how
    many experts a token uses and the least probability among them. A comparison with that gives
    the map, except where the next probability is equal.

    Returns:
        1 where an expert is selected and 0 elsewhere, [T, E] in the dtype of ``probs_TE``, because
        arithmetic with bool is slow on a CPU; and the experts of each token, [T] int64.
    """
    limit = fixed_point_threshold(threshold, probs_TE)
    most = probs_TE.shape[-1] if max_experts is None else min(probs_TE.shape[-1], max_experts)
    if _is_plain_cpu(probs_TE):
        return _select_on_cpu(probs_TE.detach(), int(limit), most)
    ascending_TE = probs_TE.sort(dim=-1).values
    sums_TE = _fixed_point(ascending_TE.flip(-1)).cumsum(dim=-1)
    limit_T1 = limit.expand(len(sums_TE), 1).contiguous()
    experts_T1 = (torch.searchsorted(sums_TE, limit_T1, right=True) + 1).clamp(max=most)
    experts_T1 = experts_T1.masked_fill(ascending_TE[:, -1:].isnan(), 1)
    least_prob_T1 = ascending_TE.gather(-1, probs_TE.shape[-1] - experts_T1)
    # A device need not wait for its host to hear which rows have ties.
    selected_TE = _map_with_ties(probs_TE, least_prob_T1, experts_T1).to(probs_TE.dtype)
    return selected_TE, experts_T1.squeeze(-1)


def _select_on_cpu(probs_TE: Tensor, limit: int, most: int) -> tuple[Tensor, Tensor]:
    """:func:`select_and_count`, with NumPy where its operations on short rows are the faster.

    It sorts 16384 rows of 64 in 2 ms with vector instructions, PyTorch's sort takes 40 ms and its
    topk of 8 takes 17 ms (one core of a Xeon with AVX-512).
    """
    num_tokens, num_experts = probs_TE.shape
    values = probs_TE.numpy()
    # As unsigned integers the bits of floats >= 0 have their order, with NaN last; and unlike
    # floats they are sorted without a look for NaN in every row.
    ascending_TE = np.sort(values.view(f"u{values.itemsize}"), axis=-1).view(values.dtype)
    experts_T = _count_on_cpu(ascending_TE, limit, most)
    # A token's least selected probability and the next after it; of all experts there is no next,
    # and the neighbour read in its place can at most send the row to be looked at as a tie.
    place_T = np.arange(1, num_tokens + 1) * num_experts - experts_T
    least_prob_T, next_T = (ascending_TE.take(places) for places in (place_T, place_T - 1))
    tie_or_nan_T = (next_T == least_prob_T) | np.isnan(least_prob_T)

    least_prob_T1 = torch.from_numpy(least_prob_T).unsqueeze(-1)
    selected_TE = torch.ge(probs_TE, least_prob_T1, out=torch.empty_like(probs_TE))
    counts_T = torch.from_numpy(experts_T)
    rows = torch.from_numpy(np.flatnonzero(tie_or_nan_T))
    if len(rows):
        exact = _map_with_ties(probs_TE[rows], least_prob_T1[rows], counts_T[rows].unsqueeze(-1))
        selected_TE[rows] = exact.to(selected_TE.dtype)
    return selected_TE, counts_T


def _count_on_cpu(ascending_TE: np.ndarray, limit: int, most: int) -> np.ndarray:
    """Experts of each token, [T] int64, from its sorted probabilities."""
    sums_T = np.zeros(len(ascending_TE), dtype=np.int64)
    experts_T = np.ones_like(sums_T)
    unit = ascending_TE.dtype.type(2.0**FIXED_POINT_BITS)
    with np.errstate(invalid="ignore"):  # NaN, below
        for taken in range(1, most):
            sums_T += (ascending_TE[:, -taken] * unit).astype(np.int64)
            wants_more_T = sums_T <= limit
            if not wants_more_T.any():
                break
            experts_T += wants_more_T
    experts_T[np.isnan(ascending_TE[:, -1])] = 1
    return experts_T


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


def check_cap(max_experts: int | None) -> None:
    """Refuse a cap below 1."""
    if max_experts is not None and max_experts < 1:
        raise ValueError(f"max_experts is {max_experts}: a token uses at least 1; None is no cap.")


@torch.no_grad()
def tokens_not_finite(logits_TE: Tensor) -> Tensor | int:
    """How many tokens have a logit that is NaN or infinite: what they select means nothing.

    A sum of logits tells. On a CPU that of all is quick and spares a look at each token.
    """
    if _is_plain_cpu(logits_TE) and math.isfinite(logits_TE.sum().item()):
        return 0
    return (logits_TE.sum(dim=-1) * 0).isnan().sum()


def fixed_point_threshold(threshold: Tensor | float, probs_TE: Tensor) -> Tensor:
    """The threshold in units of 2**-60, int64; below 0 for NaN, which no sum stays within."""
    threshold = torch.as_tensor(threshold, dtype=probs_TE.dtype, device=probs_TE.device)
    units = _fixed_point(threshold.nan_to_num(nan=-1).clamp(min=-1, max=1))
    return torch.where(threshold >= 1, NEVER_EXCEEDED, units)


def _fixed_point(values: Tensor) -> Tensor:
    return (values * 2.0**FIXED_POINT_BITS).long()  # a power of two: exact in float32 too


def _is_plain_cpu(values: Tensor) -> bool:
    return values.is_cpu and type(values) is Tensor and not torch.compiler.is_compiling()


def _map_with_ties(probs_TE: Tensor, least_prob_T1: Tensor, experts_T1: Tensor) -> Tensor:
    """The map of rows in which the lowest indices among equal probabilities are to be chosen."""
    above_TE = probs_TE > least_prob_T1
    equal_TE = probs_TE == least_prob_T1
    room_T1 = experts_T1 - above_TE.sum(dim=-1, keepdim=True)
    map_TE = above_TE | (equal_TE & (equal_TE.cumsum(dim=-1) <= room_T1))
    map_TE[:, :1] |= least_prob_T1.isnan()
    return map_TE
