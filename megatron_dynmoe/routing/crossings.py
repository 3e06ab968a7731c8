"""The thresholds at which top-p's count changes."""

from __future__ import annotations

from torch import Tensor

from megatron_dynmoe.routing.select import FIXED_POINT_BITS, most_experts, rank


def crossings(probs_TE: Tensor, max_experts: int | None) -> Tensor:
    """Find the thresholds from which a token uses a 2nd, ..., K-th expert.

    Args:
        probs_TE: [T, E] float32 or float64, rows summing to 1.
        max_experts: the cap, or None.

    Returns:
        [T, K - 1] float64, K the most experts that a token can use.
    """
    _, before_TE = rank(probs_TE)
    most = most_experts(probs_TE.shape[1], max_experts)
    # Rounding may carry a sum past 1, but a threshold of 1 must still select all experts.
    return (before_TE[:, 1:most].double() / 2.0**FIXED_POINT_BITS).clamp(max=1)
