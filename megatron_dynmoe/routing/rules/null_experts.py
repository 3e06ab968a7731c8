"""Null experts: top-k over real experts and slots that cost nothing.

The gate has one row more than there are experts. Its logit stands for M equal null slots. A token
fills K slots with its highest logits, so it uses the experts above the null logit, at most K. A
bias on the null logit, which only the choice sees, moves the number of experts.

Letters: T tokens, E experts, L = E + 1 logits, M null slots, K slots of a token, K <= M.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dynmoe.routing.select import capped, most_experts


class Slots(NamedTuple):
    """What T tokens have put into their slots. Everything but the map is differentiable."""

    probs_TE: Tensor  # of the experts, without the bias
    null_T: Tensor  # the probability of all M null slots together
    among_experts_TE: Tensor  # probabilities as if there were no null slots, for the balance loss
    map_TE: Tensor  # bool, the experts that a token uses; it may be none
    weights_TE: Tensor  # zero where not used
    residual_T: Tensor | None  # the weight of the token itself; None: null slots put out zero


def fill_slots(
    logits_TL: Tensor,
    bias: Tensor | float,
    *,
    null_slots: int,
    identity: bool,
    max_experts: int | None = None,
    renormalize: bool = True,
) -> Slots:
    """Choose K of E experts and M null slots, and weigh them.

    Args:
        logits_TL: [T, E + 1], float32 or float64, the null logit last.
        bias: what is added to the null logit for the choice alone; a number or one element.
        null_slots: M, at least K.
        identity: True: a null slot puts out the token itself. False: it puts out zero.
        max_experts: K, the slots of a token; None: as many as there are experts.
        renormalize: True: the weights of the slots that put something out sum to 1; a token
            without any has none. False: they are probabilities over all E + M slots.

    Raises:
        ValueError: the cap is below 1.
    """
    map_TE = select_above_null(logits_TL, bias, max_experts)
    num_experts = map_TE.shape[1]
    # M slots with one logit have M times its share.
    shift_L = logits_TL.new_zeros(num_experts + 1)
    shift_L[-1] = math.log(null_slots)
    probs_TE, null_T1 = (logits_TL + shift_L).softmax(dim=-1).split([num_experts, 1], dim=-1)
    null_T = null_T1.squeeze(-1)
    weights_TE, residual_T = probs_TE * map_TE, None
    if identity:
        nulls_T = most_experts(num_experts, max_experts) - map_TE.sum(dim=-1)
        residual_T = nulls_T * null_T / null_slots
    if renormalize:
        total_T = weights_TE.sum(dim=-1)
        total_T = total_T if residual_T is None else total_T + residual_T
        total_T = total_T.masked_fill(total_T == 0, 1)  # no slot that puts something out
        weights_TE = weights_TE / total_T.unsqueeze(-1)
        residual_T = None if residual_T is None else residual_T / total_T
    # Not probs_TE over its sum: that underflows where the null logit is far above the others.
    among_experts_TE = logits_TL[:, :-1].softmax(dim=-1)
    return Slots(probs_TE, null_T, among_experts_TE, map_TE, weights_TE, residual_T)


@torch.no_grad()
def select_above_null(
    logits_TL: Tensor, bias: Tensor | float, max_experts: int | None = None
) -> Tensor:
    """Choose the experts of a token's K slots: those whose logit is not below the null logit.

    At most K, the highest; ties go by index, and an expert goes before a null slot. With K <= M a
    token may use no expert at all. A token with NaN gets the first expert, so that the loss shows
    it.

    Args:
        logits_TL, bias, max_experts: as for :func:`fill_slots`.

    Returns:
        The routing map [T, E], bool.

    Raises:
        ValueError: the cap is below 1.
    """
    is_nan_T1 = logits_TL.isnan().any(dim=-1, keepdim=True)
    logits_TE, null_T1 = logits_TL[:, :-1], logits_TL[:, -1:] + bias
    map_TE = capped((logits_TE >= null_T1) & ~is_nan_T1, logits_TE, max_experts)
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
