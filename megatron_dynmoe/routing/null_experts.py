"""Null experts: top-k over real experts and slots that cost nothing.

The gate has one row more than there are experts. Its logit stands for M equal null slots. A token
fills K slots with its highest logits, so it uses the experts above the null logit, at most K. A
bias on the null logit, which only the choice sees, moves the number of experts.

Letters: T tokens, E experts, M null slots, K slots of a token, K <= M.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_dynmoe.routing.losses import sum_by_sequence
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.route import Routing, check_positions
from megatron_dynmoe.routing.select import most_experts


def route_with_nulls(
    logits_TL: Tensor,
    bias: Tensor | float,
    *,
    null_slots: int,
    identity: bool,
    theta: Tensor | None = None,
    max_experts: int | None = None,
    renormalize: bool = True,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
) -> Routing:
    """Choose K of E experts and M null slots, weigh, and sum up what losses and counters need.

    Args:
        logits_TL: [T, E + 1], any floating dtype, the null logit last. The computation is in
            float32, or in float64 if the logits are float64.
        bias: what is added to the null logit for the choice alone; a number or one element.
        null_slots: M, at least K.
        identity: True: a null slot puts out the token itself. False: it puts out zero.
        theta: [1], the scale of the normalized logits; None: they are not normalized.
        max_experts: K, the slots of a token; None: as many as there are experts.
        renormalize: True: the weights of the slots that put something out sum to 1; a token
            without any has none. False: they are probabilities over all E + M slots.
        num_sequences: B; tokens are ordered as ``position * B + sequence``.
        valid_T: [T], bool, False for padding; None: no padding.

    Returns:
        See :class:`Routing`; float32 (or float64). Weights, map and counts are those of the
        experts. The probability of the null slots counts for the balance loss as if it were spread
        evenly over the experts, so that this loss moves no token from experts to null slots.
    """
    check_positions(logits_TL, num_sequences)
    logits_TL = logits_TL.to(torch.promote_types(logits_TL.dtype, torch.float32))
    scaled_TL = logits_TL if theta is None else normalize(logits_TL, theta)
    # 1. The choice
    map_TE = select_above_null(scaled_TL, bias, max_experts)
    num_experts = map_TE.shape[1]
    experts_T = map_TE.sum(dim=-1)
    # 2. Probabilities: M slots with one logit have M times its share
    shift_L = scaled_TL.new_zeros(num_experts + 1)
    shift_L[-1] = math.log(null_slots)
    probs_TE, null_T1 = (scaled_TL + shift_L).softmax(dim=-1).split([num_experts, 1], dim=-1)
    # 3. Weights
    weights_TE = probs_TE * map_TE
    residual_T = None
    if identity:
        nulls_T = most_experts(num_experts, max_experts) - experts_T
        residual_T = nulls_T * null_T1.squeeze(-1) / null_slots
    if renormalize:
        total_T = weights_TE.sum(dim=-1)
        total_T = total_T if residual_T is None else total_T + residual_T
        total_T = total_T.masked_fill(total_T == 0, 1)  # no slot that puts something out
        weights_TE = weights_TE / total_T.unsqueeze(-1)
        residual_T = None if residual_T is None else residual_T / total_T
    # 4. Sums
    return Routing(
        weights_TE,
        map_TE,
        experts_T=experts_T,
        prob_sums_BE=sum_by_sequence(probs_TE + null_T1 / num_experts, num_sequences, valid_T),
        entropy=_sum_entropy(probs_TE, null_T1, null_slots, valid_T),
        assignments_BE=sum_by_sequence(map_TE, num_sequences, valid_T),
        not_finite=(~logits_TL.isfinite().all(dim=-1)).sum(),
        residual_T=residual_T,
    )


@torch.no_grad()
def select_above_null(
    logits_TL: Tensor, bias: Tensor | float, max_experts: int | None = None
) -> Tensor:
    """Choose the experts of a token's K slots: those whose logit is not below the null logit.

    At most K, the highest; ties go by index, and an expert goes before a null slot. With K <= M a
    token may use no expert at all. A token with NaN gets the first expert, so that the loss shows
    it.

    Args:
        logits_TL: [T, E + 1], float32 or float64, the null logit last.
        bias, max_experts: as for :func:`route_with_nulls`.

    Returns:
        The routing map [T, E], bool.

    Raises:
        ValueError: the cap is below 1.
    """
    is_nan_T1 = logits_TL.isnan().any(dim=-1, keepdim=True)
    logits_TE, null_T1 = logits_TL[:, :-1], logits_TL[:, -1:] + bias
    most = most_experts(logits_TE.shape[1], max_experts)
    sorted_TE, order_TE = logits_TE.sort(dim=-1, descending=True, stable=True)
    used_TK = (sorted_TE[:, :most] >= null_T1) & ~is_nan_T1
    map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(-1, order_TE[:, :most], used_TK)
    map_TE[:, :1] |= is_nan_T1
    return map_TE


def null_crossings(logits_TL: Tensor, max_experts: int | None) -> Tensor:
    """Find the biases up to which a token uses a 1st, ..., K-th expert.

    The count falls with the bias. A token uses its j-th expert if and only if the bias is not above
    its j-th largest logit less the null logit.

    Args:
        logits_TL: [T, E + 1], the null logit last, normalized if the routing normalizes.
        max_experts: K, or None.

    Returns:
        [T, K] float64.
    """
    most = most_experts(logits_TL.shape[1] - 1, max_experts)
    highest_TK = logits_TL[:, :-1].topk(most, dim=-1).values
    return highest_TK.double() - logits_TL[:, -1:].double()


def _sum_entropy(
    probs_TE: Tensor, null_T1: Tensor, null_slots: int, valid_T: Tensor | None
) -> Tensor:
    """The entropy over all E + M slots, in nats, summed over valid tokens: a scalar."""
    tiny = torch.finfo(probs_TE.dtype).tiny  # log(0) must not reach the gradient
    each_TE = probs_TE * probs_TE.clamp(min=tiny).log()
    null_T = (null_T1 * (null_T1 / null_slots).clamp(min=tiny).log()).squeeze(-1)
    entropy_T = -(each_TE.sum(dim=-1) + null_T)
    return (entropy_T if valid_T is None else entropy_T * valid_T).sum()
