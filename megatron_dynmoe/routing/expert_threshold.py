"""Expert thresholds: an expert takes the tokens whose score exceeds its own threshold.

A threshold follows the quantile of the expert's scores over global batches, so that in the long run
every expert takes the same share of all tokens. Letters beyond those of the package: N bins of the
scores of one expert, N - 1 edges between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dynmoe.routing.losses import sum_by_sequence, sum_entropy
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.route import Routing, check_positions
from megatron_dynmoe.routing.select import most_experts

# The edges of the bins, as distances from the threshold. They are powers of 2, which float32 holds
# exactly. The threshold itself is an edge, so that a share that is right is seen to be exactly
# right. The bins are finest near it, whatever the scale of the logits.
_DISTANCES = [2.0**power for power in range(-12, 5)]
EDGES = (*(-distance for distance in reversed(_DISTANCES)), 0.0, *_DISTANCES)
NUM_BINS = len(EDGES) + 1

# How far beyond two shares the chord between their quantiles reaches, as a part of the share. A
# wider chord averages over more tokens, a narrower one is nearer to the tangent.
_CHORD = 0.25


def route(
    logits_TE: Tensor,
    thresholds_E: Tensor,
    *,
    theta: Tensor | None = None,
    max_experts: int | None = None,
    renormalize: bool = False,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
) -> Routing:
    """Route a micro-batch: an expert takes the tokens whose logit exceeds its threshold.

    Weights are sigmoids of the logits. A token with a logit that is not finite is left to the
    checks for such logits; NaN exceeds nothing. Losses see the sigmoids divided by their sum.

    Args:
        logits_TE: [T, E], any floating dtype; computed in float32, or float64 if they are.
        thresholds_E: [E].
        max_experts: the cap. Of the experts that would take a token, those with the largest logits
            do. None: no cap.
        theta, renormalize, num_sequences, valid_T: as for
            :func:`megatron_dynmoe.routing.route.route`.

    Returns:
        See :class:`Routing`. ``sums_W`` are the tokens in each bin, for :func:`next_thresholds`. A
        token may have no expert.
    """
    check_positions(logits_TE, num_sequences)
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).contiguous()
    scaled_TE = logits_TE if theta is None else normalize(logits_TE, theta)
    map_TE = select(scaled_TE, thresholds_E, max_experts)
    scores_TE = scaled_TE.sigmoid()
    weights_TE = scores_TE * map_TE
    tiny = torch.finfo(scores_TE.dtype).tiny
    if renormalize:
        weights_TE = weights_TE / weights_TE.sum(dim=-1, keepdim=True).clamp(min=tiny)
    probs_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp(min=tiny)
    return Routing(
        weights_TE,
        map_TE,
        experts_T=map_TE.sum(dim=-1),
        prob_sums_BE=sum_by_sequence(probs_TE, num_sequences, valid_T),
        entropy=sum_entropy(probs_TE, valid_T),
        assignments_BE=sum_by_sequence(map_TE, num_sequences, valid_T),
        not_finite=(~logits_TE.isfinite().all(dim=-1)).sum(),
        sums_W=count(scaled_TE, thresholds_E, valid_T).double(),
    )


@torch.no_grad()
def select(logits_TE: Tensor, thresholds_E: Tensor, max_experts: int | None = None) -> Tensor:
    """Choose the experts of each token: ``logit > threshold``, at most ``max_experts``.

    Returns:
        The routing map [T, E], bool.

    Raises:
        ValueError: the cap is below 1.
    """
    map_TE = logits_TE > thresholds_E
    num_experts = logits_TE.shape[-1]
    if (most := most_experts(num_experts, max_experts)) == num_experts:
        return map_TE
    # Ties go by index, so that all devices agree.
    taken_TE = logits_TE.masked_fill(~map_TE, -torch.inf)
    order_TE = taken_TE.sort(dim=-1, descending=True, stable=True).indices[:, :most]
    return map_TE & torch.zeros_like(map_TE).scatter(-1, order_TE, True)


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
    edges = torch.tensor(EDGES, dtype=logits_TE.dtype, device=logits_TE.device)
    # A logit on an edge lies below it, because it does not exceed it.
    bins_TE = torch.bucketize(logits_TE - thresholds_E, edges)
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
        share: from 0 to 1; a number or a tensor of one element.

    Returns:
        [E] float64; NaN if there are no tokens.
    """
    edges_EN = thresholds_E.double().unsqueeze(-1) + torch.tensor(
        EDGES, dtype=torch.float64, device=thresholds_E.device
    )
    above_EN = counts_EN.double().flip(-1).cumsum(-1).flip(-1)  # from each bin up
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
        share: [1], q, the share of tokens that an expert took to that batch.
        next_share: [1], q', that of the next batch.
        weight: w, from 0 to 1; a number or a tensor of one element.

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
