"""Quantiles over the tokens of global batches, from counts in bins.

The thresholds of :mod:`~megatron_dynmoe.routing.rules.expert_threshold` follow those of each
expert's logits. The bias of :mod:`~megatron_dynmoe.routing.rules.null_experts` follows that of a
token's crossings, which are counted as the logits of one expert are: read *crossings* for logits
and *bias* for the threshold then. Letters beyond those of the package: N bins of the logits of one
expert, N - 1 edges between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The edges of the bins, as distances from the threshold. They are powers of 2, which float32 holds
# exactly. The threshold itself is an edge, so that a share that is right is seen to be exactly
# right. The bins are finest near it, whatever the scale of the logits.
_DISTANCES = [2.0**power for power in range(-12, 5)]
EDGES = (*(-distance for distance in reversed(_DISTANCES)), 0.0, *_DISTANCES)
NUM_BINS = len(EDGES) + 1

# How far beyond two shares the chord between their quantiles reaches, as a part of the share. A
# wider chord averages over more tokens, a narrower one is nearer to the tangent.
_CHORD = 0.25


@torch.no_grad()
def count(logits_TE: Tensor, thresholds_E: Tensor, valid_T: Tensor | None) -> Tensor:
    """Count the valid tokens in each bin of each expert.

    The counts are integers. So their sum over micro-batches and ranks is the same in any order, and
    in any layout.

    Args:
        logits_TE: as scaled.
        thresholds_E: those in use.
        valid_T: [T], bool, False for padding; None: no padding.

    Returns:
        [E * N] int64, the bins of one expert side by side, from the lowest logits up.
    """
    num_experts = len(thresholds_E)
    # A logit on an edge lies below it, because it does not exceed it.
    bins_TE = torch.bucketize(logits_TE - thresholds_E, _edges(logits_TE))
    bins_TE = bins_TE + torch.arange(num_experts, device=bins_TE.device) * NUM_BINS
    ones_TE = torch.ones_like(bins_TE) if valid_T is None else valid_T.long().unsqueeze(-1)
    counts = bins_TE.new_zeros(num_experts * NUM_BINS)
    return counts.scatter_add(0, bins_TE.flatten(), ones_TE.expand_as(bins_TE).flatten())


def quantile(counts_EN: Tensor, thresholds_E: Tensor, share: Tensor | float) -> Tensor:
    """Find the threshold that a share of the tokens exceeds, for each expert.

    Between two edges, the tokens of a bin count as evenly spread. Beyond the outer edges there is
    nothing to go by, so these are the least and the largest result.

    Args:
        counts_EN: [E, N], the tokens of a global batch in each bin.
        thresholds_E: [E], those around which the bins lie.
        share: from 0 to 1; a number or, for each expert or for all, a tensor [E] or [1].

    Returns:
        [E] float64; NaN if there are no tokens.
    """
    thresholds_E = thresholds_E.double()
    edges_EN = thresholds_E.unsqueeze(-1) + _edges(thresholds_E)
    above_EN = counts_EN.double().flip(-1).cumsum(-1).flip(-1)  # from each bin up
    if isinstance(share, Tensor):
        share = share.unsqueeze(-1)
    wanted_E1 = share * above_EN[:, :1]
    above_EN = above_EN[:, 1:]  # from each edge up
    # The first edge that no more tokens exceed than are wanted; the quantile lies below it.
    upper_E1 = (above_EN > wanted_E1).sum(dim=-1, keepdim=True)
    last = len(EDGES) - 1
    high_E1, low_E1 = upper_E1.clamp(max=last), (upper_E1 - 1).clamp(min=0)
    above_high_E1, above_low_E1 = above_EN.gather(-1, high_E1), above_EN.gather(-1, low_E1)
    high_edge_E1, low_edge_E1 = edges_EN.gather(-1, high_E1), edges_EN.gather(-1, low_E1)
    between_E1 = above_low_E1 - above_high_E1  # 0 beyond the outer edges, where both are one edge
    way_E1 = ((wanted_E1 - above_high_E1) / between_E1.clamp(min=1)).clamp(0, 1)
    found_E1 = torch.lerp(high_edge_E1, low_edge_E1, way_E1)
    return torch.where(counts_EN.sum(-1) > 0, found_E1.squeeze(-1), torch.nan)


def next_thresholds(
    thresholds_E: Tensor,
    counts_EN: Tensor,
    share: Tensor,
    next_share: Tensor,
    weight: Tensor | float,
) -> Tensor:
    """Compute the thresholds after a global batch.

    ``c + w (Q(q) - c) + s (q - q')``: the moving average of the quantile, of which the last batch
    has the weight w; and the way that the quantile moves if the share changes from q to q'. The
    whole average then stands for the new share, as if all batches had been averaged at it. Without
    the second part, the count would follow the share only as slowly as the average does.

    Args:
        thresholds_E: [E], c, during that batch.
        counts_EN: [E, N], its tokens in each bin.
        share: q, the share of tokens that an expert took to that batch, [E] or [1].
        next_share: q', that of the next batch, as ``share``.
        weight: w, from 0 to 1; a number, or as ``share``.

    Returns:
        [E] float32. An expert for which nothing was counted keeps its threshold.
    """
    old_E, share, next_share = thresholds_E.double(), share.double(), next_share.double()
    at_share_E = quantile(counts_EN, thresholds_E, share)
    # s is the slope of a chord that contains both shares: a tangent would take its value from the
    # few tokens between two shares that are almost equal.
    low = torch.minimum(share, next_share) * (1 - _CHORD)
    high = (torch.maximum(share, next_share) * (1 + _CHORD)).clamp(max=1)
    fall_E = quantile(counts_EN, thresholds_E, low) - quantile(counts_EN, thresholds_E, high)
    slope_E = fall_E / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    next_E = old_E + weight * (at_share_E - old_E) + slope_E * (share - next_share)
    return torch.where(next_E.isfinite(), next_E, old_E).float()


def _edges(like: Tensor) -> Tensor:
    """:data:`EDGES` as a tensor, made on the device: for a copy, the host would wait."""
    distances = like.new_full((len(_DISTANCES),), 2.0)
    distances[0] = _DISTANCES[0]
    distances = distances.cumprod(dim=0)  # powers of 2: exact in any order
    return torch.cat([-distances.flip(0), distances.new_zeros(1), distances])
