"""``pytorch/router.py`` and ``common/fused_router/``: top-k routers. Softmax only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..not_stood_for import NotStoodFor, refuse


def fused_topk_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: Tensor | None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Weights in the logits' type and a bool map, both [T, E]; computed in float32."""
    refuse(num_groups=num_groups, group_topk=group_topk, bias=expert_bias is not None, **unused)
    if logits.dtype == torch.float64:
        raise ValueError("Current TE does not support float64 router type.")
    if score_function != "softmax":
        raise NotStoodFor(f"score function {score_function}")
    wide = logits.float()
    scores = wide.softmax(dim=-1) if use_pre_softmax else wide
    top, index = scores.topk(topk, dim=-1)
    if not use_pre_softmax:
        top = top.softmax(dim=-1)
    probs = torch.zeros_like(wide).scatter(-1, index, top * (scaling_factor or 1.0))
    routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, True)
    return probs.to(logits.dtype), routing_map


def fused_compute_score_for_moe_aux_loss(
    logits: Tensor, topk: int, score_function: str
) -> tuple[Tensor, Tensor]:
    """The map of the top k and the scores over all experts in float32."""
    if score_function != "softmax":
        raise NotStoodFor(f"score function {score_function}")
    scores = logits.float().softmax(dim=-1)
    index = scores.topk(topk, dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, True), scores


def fused_moe_aux_loss(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int | Tensor,
    num_experts: int,
    topk: int,
    coeff: float,
) -> Tensor:
    """``coeff * E / (k T^2) * sum_e tokens_e * sum_t probs_te``, in the type of probs."""
    factor = num_experts * coeff / topk / total_num_tokens / total_num_tokens
    loss = (probs.float().sum(dim=0) * tokens_per_expert.float()).sum() * factor
    return loss.to(probs.dtype)
