"""Null experts: a token fills K slots with experts and with slots that cost nothing.

From *Improving MoE Compute Efficiency by Composing Weight and Data Sparsity* and LongCat-Flash; see
docs/rules.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dynmoe.moe.rules.rule import Rule
from megatron_dynmoe.routing.null_experts import Slots, fill_slots, null_crossings
from megatron_dynmoe.routing.route import Routing, scale, summed
from megatron_dynmoe.routing.select import most_experts
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import SettingError


class NullExperts(Rule):
    """See :mod:`megatron_dynmoe.routing.null_experts`; the cap is K, a token's slots.

    State: ``null_bias``, [1], added to the null logit for the choice alone.
    """

    knob = "null_bias"
    direction = -1  # a larger bias never selects more experts
    entries = ("null_bias",)
    extra_logits = 1  # that of the null slots

    def __init__(self, dynmoe: DynMoEConfig, first: float | None, num_experts: int) -> None:
        super().__init__(dynmoe, first, num_experts)
        slots = max(most_experts(num_experts, self.cap(training)) for training in (True, False))
        assert dynmoe.null_slots is not None
        if dynmoe.null_slots < slots:
            raise SettingError(
                "null_slots",
                dynmoe.null_slots,
                f", fewer than the {slots} slots of a token ({{max_experts_per_token}})",
                f"use {slots} or more, so that any number of slots can be null",
            )
        self.null_slots = dynmoe.null_slots

    def route(
        self,
        logits_TE: Tensor,
        state: Mapping[str, Tensor],
        *,
        training: bool,
        group: ProcessGroup | None,
        **batch: Any,
    ) -> Routing:
        return route_with_nulls(
            logits_TE,
            state["null_bias"],
            null_slots=self.null_slots,
            identity=self.dynmoe.null_kind == "identity",
            max_experts=self.cap(training),
            renormalize=self.dynmoe.weights == "renormalized",
            **batch,
        )

    @staticmethod
    def crossings(logits_TE: Tensor, max_experts: int | None) -> Tensor:
        return null_crossings(logits_TE, max_experts)


def route_with_nulls(
    logits_TL: Tensor,
    bias: Tensor | float,
    *,
    null_slots: int,
    theta: Tensor | None = None,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
    **how: Any,
) -> Routing:
    """Normalize, fill the slots, and sum up what losses and counters need.

    Args:
        logits_TL: [T, E + 1], any floating dtype, the null logit last. The computation is in
            float32, or in float64 if the logits are float64.
        bias, null_slots and how: as for :func:`fill_slots`.
        theta, num_sequences, valid_T: as for :meth:`Rule.route`.

    Returns:
        Weights, map and counts are those of the experts; float32 (or float64).
    """
    logits_TL, scaled_TL = scale(logits_TL, theta, num_sequences)
    slots = fill_slots(scaled_TL, bias, null_slots=null_slots, **how)
    return summed(
        logits_TL,
        slots.spread_TE,
        slots.map_TE,
        slots.weights_TE,
        num_sequences,
        valid_T,
        entropy=_sum_entropy(slots, null_slots, valid_T),
        residual_T=slots.residual_T,
    )


def _sum_entropy(slots: Slots, null_slots: int, valid_T: Tensor | None) -> Tensor:
    """The entropy over all E + M slots, in nats, summed over valid tokens: a scalar."""
    tiny = torch.finfo(slots.null_T.dtype).tiny  # log(0) must not reach the gradient
    entropy_T = -(slots.probs_TE * slots.probs_TE.clamp(min=tiny).log()).sum(dim=-1)
    entropy_T = entropy_T - slots.null_T * (slots.null_T / null_slots).clamp(min=tiny).log()
    return (entropy_T if valid_T is None else entropy_T * valid_T).sum()
