"""Expert thresholds as plain loops, one token and one expert at a time.

Slow on purpose, and shares no code with the package. Numbers are floats, or 0-d tensors where
autograd gives the gradients to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def choose(logits: Sequence[float], thresholds: Sequence[float], cap: int | None) -> set[int]:
    """The experts of one token: those whose threshold it exceeds, the largest logits first."""
    takers = [e for e in range(len(logits)) if logits[e] > thresholds[e]]
    takers.sort(key=lambda expert: (-logits[expert], expert))
    return set(takers[:cap])


def sigmoid(logit):
    return 1 / (1 + torch.exp(-logit))


def bins(logits: Sequence[float], threshold: float, edges: Sequence[float]) -> list[int]:
    """How many of one expert's logits lie in each bin; a bin includes its upper edge."""
    counts = [0] * (len(edges) + 1)
    for logit in logits:
        place = 0
        while place < len(edges) and logit - threshold > edges[place]:
            place += 1
        counts[place] += 1
    return counts


def quantile(
    counts: Sequence[int], threshold: float, edges: Sequence[float], share: float
) -> float:
    """Walk down from the highest edge until enough tokens lie above, then go back a part of a bin.

    The tokens of a bin are evenly spread. There is no result beyond the outer edges.
    """
    wanted = share * sum(counts)
    above = counts[-1]
    if above > wanted:
        return threshold + edges[-1]
    found = threshold + edges[-1]
    for place in range(len(edges) - 2, -1, -1):
        in_bin = counts[place + 1]
        if above + in_bin > wanted:
            way = (wanted - above) / in_bin
            return found - way * (edges[place + 1] - edges[place])
        above += in_bin
        found = threshold + edges[place]
    return found


def next_threshold(
    counts: Sequence[int],
    threshold: float,
    edges: Sequence[float],
    share: float,
    next_share: float,
    weight: float,
) -> float:
    """One expert's threshold after a batch: the moving average, moved to the next share."""
    averaged = (1 - weight) * threshold + weight * quantile(counts, threshold, edges, share)
    low = 0.75 * min(share, next_share)
    high = min(1.0, 1.25 * max(share, next_share))
    if high == low:
        return averaged
    rise = quantile(counts, threshold, edges, high) - quantile(counts, threshold, edges, low)
    return averaged + rise / (high - low) * (next_share - share)


def exact_quantile(logits: Sequence[float], share: float) -> float:
    """The logit that exactly so many tokens exceed, from the logits themselves."""
    ordered = sorted(logits, reverse=True)
    return ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))]
