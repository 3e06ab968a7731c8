"""Top-p selection: how many experts a token uses, which ones, and with what weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Cumulative probabilities are sums of 64-bit integers in units of 2**-60. Such a sum is exact in
# any order. All implementations of this rule therefore agree on every token, even if they sum in
# different orders. A float32 probability above 2**-37 is represented without loss.
FIXED_POINT_BITS = 60
NEVER_EXCEEDED = torch.iinfo(torch.int64).max


@torch.no_grad()
def select(probs_TE: Tensor, threshold: Tensor | float, max_experts: int | None = None) -> Tensor:
    """Choose each token's experts (Algorithm 1 of Dynamic MoE).

    Sort the probabilities in descending order, ties by expert index, and keep the shortest prefix
    whose sum exceeds the threshold (strictly). If the sum never exceeds it, as for a threshold of 1
    or more, keep all experts. A token uses at least one expert and at most ``max_experts``. A token
    with NaN gets the first expert: a run that has gone wrong then ends in Megatron's own check for
    NaN and does not run out of memory before.

    Args:
        probs_TE: [T, E], float32 or float64, rows summing to 1.
        threshold: a number or a tensor of one element or, one for each token, of [T, 1], taken in
            the dtype of ``probs_TE``.
        max_experts: the cap, or None.

    Returns:
        The routing map [T, E], bool. Not differentiable: gradients flow through the weights.

    Raises:
        ValueError: the probabilities have another dtype, or the cap is below 1.
    """
    ids_TK, used_TK = choose(probs_TE, threshold, max_experts)
    return torch.zeros_like(probs_TE, dtype=torch.bool).scatter(-1, ids_TK, used_TK)


@torch.no_grad()
def choose(
    probs_TE: Tensor, threshold: Tensor | float, max_experts: int | None = None
) -> tuple[Tensor, Tensor]:
    """Choose as :func:`select` does, and give each token's experts in slots.

    Arguments and errors are those of :func:`select`. There are K slots, the cap or all E.

    Returns:
        The K most probable experts of each token in descending order, int64, and which of them it
        uses, bool: the first ones. Both [T, K].
    """
    if probs_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"probabilities are {probs_TE.dtype}: use float32 or float64.")
    most = most_experts(probs_TE.shape[-1], max_experts)
    is_nan_T1 = probs_TE.isnan().any(dim=-1, keepdim=True)
    sorted_TE, order_TE = _sort(probs_TE.masked_fill(is_nan_T1, 0))
    used_TK = used_in_order(sorted_TE, threshold_in_units(threshold, probs_TE), most)
    used_TK[:, 1:].logical_and_(~is_nan_T1)
    return order_TE[:, :most], used_TK


def used_in_order(sorted_TE: Tensor, limit: Tensor | int, most: int) -> Tensor:
    """Say which experts are used: all until their sum exceeds the limit, and always the first.

    Args:
        sorted_TE: probabilities in descending order.
        limit: the threshold in units; see :func:`threshold_in_units`.
        most: the most experts of a token, K.

    Returns:
        [T, K] bool.
    """
    sums_TE = _in_units(sorted_TE).cumsum(dim=-1)
    return F.pad(sums_TE[:, : most - 1] <= limit, (1, 0), value=True)


@torch.no_grad()
def choose_top_k(probs_TE: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Choose each token's ``num_experts`` most probable experts; ties go by index.

    Returns:
        As :func:`choose`; every slot is used.
    """
    _, order_TE = _sort(probs_TE)
    ids_TK = order_TE[:, :num_experts]
    return ids_TK, torch.ones_like(ids_TK, dtype=torch.bool)


def capped(map_TE: Tensor, scores_TE: Tensor, max_experts: int | None) -> Tensor:
    """Leave each token at most ``max_experts`` of its experts, those with the largest scores.

    Args:
        map_TE: [T, E], bool.
        scores_TE: [T, E]; ties go by expert index. Where the map is False, it may be anything.
        max_experts: the cap, or None.

    Raises:
        ValueError: the cap is below 1.
    """
    num_experts = map_TE.shape[-1]
    if (most := most_experts(num_experts, max_experts)) == num_experts:
        return map_TE
    ids_TK, _ = choose_top_k(scores_TE.detach().masked_fill(~map_TE, -torch.inf), most)
    return map_TE & torch.zeros_like(map_TE).scatter(-1, ids_TK, True)


def rank(probs_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Order each token's experts by descending probability, ties by expert index.

    Returns:
        The expert in each place of the order, and the sum of the probabilities in the places before
        it, exact in units of 2**-60; both [T, E] int64.
    """
    sorted_TE, order_TE = _sort(probs_TE)
    return order_TE, _sum_before(sorted_TE)


def weigh(probs_TE: Tensor, routing_map_TE: Tensor, renormalize: bool) -> Tensor:
    """Compute the weights of the selected experts; all others get zero.

    The weights are the raw probabilities (equation 4 of Dynamic MoE), or these renormalized over
    the selected set so that they sum to 1 (DTop-p).

    Args:
        probs_TE: [T, E].
        routing_map_TE: [T, E], bool. A token may have no expert.
        renormalize: whether the weights are renormalized.

    Returns:
        [T, E], dtype of ``probs_TE``, differentiable in it.
    """
    weights_TE = probs_TE * routing_map_TE
    if renormalize:
        total_T1 = weights_TE.sum(dim=-1, keepdim=True)
        weights_TE = weights_TE / total_T1.masked_fill(total_T1 == 0, 1)
    return weights_TE


def most_experts(num_experts: int, max_experts: int | None) -> int:
    """Return K, the most experts that a token can use under a cap (None: no cap).

    Raises:
        ValueError: the cap is below 1.
    """
    if max_experts is None:
        return num_experts
    if max_experts < 1:
        raise ValueError(f"max_experts is {max_experts}: a token uses at least 1; None is no cap.")
    return min(num_experts, max_experts)


def threshold_in_units(threshold: Tensor | float, probs_TE: Tensor) -> Tensor:
    """Return the threshold in units of 2**-60, int64; negative for NaN, so every sum exceeds it."""
    threshold = torch.as_tensor(threshold, dtype=probs_TE.dtype, device=probs_TE.device)
    units = _in_units(threshold.nan_to_num(nan=-1).clamp(min=-1, max=1))
    return torch.where(threshold >= 1, NEVER_EXCEEDED, units)


def _sort(probs_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities in descending order and their experts, ties by expert index, both [T, E]."""
    return probs_TE.sort(dim=-1, descending=True, stable=True)


def _sum_before(sorted_TE: Tensor) -> Tensor:
    """The sum of the probabilities before each place, in units of 2**-60, [T, E] int64."""
    units_TE = _in_units(sorted_TE)
    return units_TE.cumsum(dim=-1) - units_TE


def _in_units(values: Tensor) -> Tensor:
    return (values * 2.0**FIXED_POINT_BITS).long()  # a power of two: exact in float32, too
