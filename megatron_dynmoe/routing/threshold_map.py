"""A map from targets to thresholds, given at a few targets, the *knots*: reading and ordering it.

Letters: K knots, S thresholds at each (1, or as many as there are layers).
"""

from __future__ import annotations

import torch
from torch import Tensor


def read(map_SK: Tensor, place: tuple[int, float]) -> Tensor:
    """Read a map at a place between its knots, [S].

    Args:
        map_SK: [S, K], the threshold at each knot.
        place: a knot k, and the way w from there to the next knot, 0 <= w < 1. The result is
            ``(1 - w) m_k + w m_{k+1}``.
    """
    knot, way = place
    if way == 0:
        return map_SK[..., knot]
    return torch.lerp(map_SK[..., knot], map_SK[..., knot + 1], way)


def ordered(map_SK: Tensor, weights_K: Tensor) -> Tensor:
    """Find the map nearest to a given one that does not fall from knot to knot.

    It minimizes ``sum_k weights_k (result_k - map_k)^2`` (isotonic regression). Runs of knots that
    are out of order become their weighted mean. A map in order is returned with every bit.

    Args:
        map_SK: [S, K] float32.
        weights_K: [K] float32, positive.
    """
    num_knots = map_SK.shape[-1]
    if num_knots == 1:
        return map_SK
    # The minimum is max over i <= k of min over j >= k of the mean over knots i to j.
    weights = weights_K.double()
    sums = torch.nn.functional.pad((map_SK * weights).cumsum(-1), (1, 0))
    totals = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))
    knots = torch.arange(num_knots, device=map_SK.device)
    is_empty_KK = knots < knots[:, None]  # [i, j]: j lies below i
    spans_KK = (totals[1:] - totals[:-1, None]).masked_fill(is_empty_KK, 1.0)
    means_SKK = (sums[..., None, 1:] - sums[..., :-1, None]) / spans_KK
    means_SKK = means_SKK.masked_fill(is_empty_KK, torch.inf)
    least_SKK = means_SKK.flip(-1).cummin(-1).values.flip(-1)  # [i, k]: min over j >= k
    least_SKK = least_SKK.masked_fill(is_empty_KK, -torch.inf)
    nearest_SK = least_SKK.amax(-2).to(map_SK.dtype).cummax(-1).values
    is_ordered_S = (map_SK.diff(dim=-1) >= 0).all(-1, keepdim=True)
    return torch.where(is_ordered_S, map_SK, nearest_SK)
