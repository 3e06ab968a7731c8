"""SeqTopK: the best scores of a sequence (training), or all scores above a threshold (causal)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dynmoe.routing.select import choose_top_k, most_experts

PADDING = -1.0  # the score of padding, below that of every expert


class Taken(NamedTuple):
    """What :func:`take_best` has taken of each sequence."""

    used_SBK: Tensor  # [S, B, K] bool: of each token its first slots, or none
    left_out_B: Tensor  # [B], the best score that was not taken; 0 if all were
    tokens_B: Tensor  # [B] int64, the number of tokens without padding


@torch.no_grad()
def scores_in_order(
    probs_TE: Tensor, max_experts: int | None = None, valid_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Order each token's experts by descending probability, ties by expert index, up to the cap.

    If a probability of a token is NaN, the token's first slot beats every score, and its others
    lose to every score. A run that has gone wrong then ends in Megatron's own check for NaN.

    Args:
        probs_TE: [T, E] float32 or float64.
        max_experts: the cap, or None.
        valid_T: [T], bool, False for padding, which gets :data:`PADDING`. None: no padding.

    Returns:
        The K best scores of each token, K the cap or all E, and their experts, int64; both [T, K].

    Raises:
        ValueError: the cap is below 1.
    """
    most = most_experts(probs_TE.shape[-1], max_experts)
    is_nan_T1 = probs_TE.isnan().any(dim=-1, keepdim=True)
    ids_TK, _ = choose_top_k(probs_TE.masked_fill(is_nan_T1, 0), most)
    scores_TK = probs_TE.gather(-1, ids_TK).masked_fill(is_nan_T1, 0)
    scores_TK[:, :1].masked_fill_(is_nan_T1, 2)
    if valid_T is not None:
        scores_TK.masked_fill_(~valid_T.unsqueeze(-1), PADDING)
    return scores_TK, ids_TK


@torch.no_grad()
def take_best(scores_SBK: Tensor, mean: float) -> Taken:
    """Take the ``mean * tokens`` best scores of each sequence, rounded down.

    Ties go to the earlier position, then to the earlier slot. A slot is never taken before the
    slots in front of it, because these have no lower scores.

    Args:
        scores_SBK: [S, B, K], the scores of S positions of B sequences, of each token in descending
            order and not negative, or :data:`PADDING` in all slots.
        mean: the experts per token, at most K.
    """
    flat_BN = scores_SBK.transpose(0, 1).flatten(1)
    sorted_BN, order_BN = flat_BN.sort(dim=-1, descending=True, stable=True)
    tokens_B = (scores_SBK[..., 0] >= 0).sum(dim=0)
    # A mean such as 1.4 lies a little beside its decimal number: of 90 tokens it is 126 experts.
    budget_B1 = (tokens_B.double() * mean + 1e-6).floor().long().unsqueeze(-1)
    places_N = torch.arange(flat_BN.shape[1], device=flat_BN.device)
    used_BN = torch.zeros_like(flat_BN, dtype=torch.bool)
    used_BN.scatter_(-1, order_BN, places_N < budget_B1)
    used_SBK = used_BN.view(scores_SBK.transpose(0, 1).shape).transpose(0, 1)
    # One place more than there are scores, so that there is a score after the last
    after_BN = torch.nn.functional.pad(sorted_BN.clamp(min=0), (0, 1))
    return Taken(used_SBK, after_BN.gather(-1, budget_B1).squeeze(-1), tokens_B)


@torch.no_grad()
def select_above(
    probs_TE: Tensor, threshold: Tensor | float, max_experts: int | None = None
) -> Tensor:
    """Choose the experts whose probability exceeds the threshold: at most the cap, perhaps none.

    Args:
        probs_TE: as for :func:`scores_in_order`, and in any dtype.
        threshold: a number or a tensor of one element.
        max_experts: the cap, or None.

    Returns:
        The routing map [T, E], bool.
    """
    scores_TK, ids_TK = scores_in_order(probs_TE, max_experts)
    return as_map(ids_TK, scores_TK > threshold, probs_TE.shape[-1])


def as_map(ids_TK: Tensor, used_TK: Tensor, num_experts: int) -> Tensor:
    """The routing map, [T, E] bool, of experts in slots of which some are used."""
    map_TE = used_TK.new_zeros(len(ids_TK), num_experts)
    return map_TE.scatter(-1, ids_TK, used_TK)
