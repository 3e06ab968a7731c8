"""Expert thresholds: an expert takes the tokens whose logit exceeds its own threshold.

``quantiles.py`` says how the thresholds follow the logits in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dynmoe.routing.select import capped, weigh


def choose_above_thresholds(
    logits_TE: Tensor, thresholds_E: Tensor, max_experts: int | None, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts and weigh them by the sigmoids of their logits.

    Args:
        logits_TE: [T, E] float32 or wider, normalized if the routing normalizes.
        thresholds_E: [E].
        max_experts: the cap. Of the experts that would take a token, those with the largest logits
            do. None: no cap.
        renormalize: True: a token's weights sum to 1. False: they are the sigmoids.

    Returns:
        The sigmoids divided by their sum over all experts, from which losses are computed; the
        routing map, bool, which may be empty for a token (NaN exceeds nothing); and the weights,
        zero where not chosen (NaN for a logit that is NaN). All [T, E].
    """
    map_TE = select(logits_TE, thresholds_E, max_experts)
    scores_TE = logits_TE.sigmoid()
    sum_T1 = scores_TE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)
    return scores_TE / sum_T1, map_TE, weigh(scores_TE, map_TE, renormalize)


@torch.no_grad()
def select(logits_TE: Tensor, thresholds_E: Tensor, max_experts: int | None = None) -> Tensor:
    """Choose the experts of each token: ``logit > threshold``, at most ``max_experts``.

    Returns:
        The routing map [T, E], bool.

    Raises:
        ValueError: the cap is below 1.
    """
    return capped(logits_TE > thresholds_E, logits_TE, max_experts)
