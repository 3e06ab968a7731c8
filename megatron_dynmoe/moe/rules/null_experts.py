"""Null experts: a token fills K slots with experts and with slots that cost nothing.

From *Improving MoE Compute Efficiency by Composing Weight and Data Sparsity* and LongCat-Flash; see
docs/rules.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dynmoe.moe.rules.rule import Rule
from megatron_dynmoe.routing.null_experts import null_crossings, route_with_nulls
from megatron_dynmoe.routing.route import Routing
from megatron_dynmoe.routing.select import most_experts
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import SettingError


class NullExperts(Rule):
    """See :mod:`megatron_dynmoe.routing.null_experts`; the cap is K, a token's slots."""

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
        override = None if training else self.dynmoe.inference_threshold
        return route_with_nulls(
            logits_TE,
            state["null_bias"] if override is None else override,
            null_slots=self.null_slots,
            identity=self.dynmoe.null_kind == "identity",
            max_experts=self.cap(training),
            renormalize=self.dynmoe.weights == "renormalized",
            **batch,
        )

    @staticmethod
    def crossings(logits_TE: Tensor, max_experts: int | None, **settings: Any) -> Tensor:
        return null_crossings(logits_TE, max_experts)
