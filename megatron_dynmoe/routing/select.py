"""Top-p selection: how many experts a token uses, which ones, and with what weight."""

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
    with torch.no_grad():
        sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
        units_TE = _fixed_point(sorted_TE)
        before_TE = units_TE.cumsum(dim=-1) - units_TE
        keep_TE = (before_TE <= _fixed_point_threshold(threshold, probs_TE)) & (sorted_TE >= 0)
        keep_TE[:, 0] = True
        if max_experts is not None:
            keep_TE[:, max_experts:] = False
        return torch.zeros_like(keep_TE).scatter_(-1, order_TE, keep_TE)


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


def _fixed_point(values: Tensor) -> Tensor:
    return (values.double() * 2.0**FIXED_POINT_BITS).long()


def _fixed_point_threshold(threshold: Tensor | float, probs_TE: Tensor) -> Tensor:
    threshold = torch.as_tensor(threshold, dtype=probs_TE.dtype, device=probs_TE.device)
    return torch.where(threshold >= 1, NEVER_EXCEEDED, _fixed_point(threshold.clamp(max=1)))
