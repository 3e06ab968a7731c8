"""Top-p: a token uses the smallest set of experts whose probability exceeds the threshold.

The threshold is fixed in *Harder Task Needs More Experts*; in DTop-p a controller moves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron_dynmoe import kernels
from megatron_dynmoe.routing.route import Routing
from megatron_dynmoe.settings.config import DynMoEConfig


class TopP:
    """See :class:`megatron_dynmoe.moe.rules.Rule` and :mod:`megatron_dynmoe.routing`."""

    knob: str | None = "threshold"
    direction = 1  # a larger threshold never selects fewer experts

    def __init__(self, dynmoe: DynMoEConfig, initial_threshold: float) -> None:
        self.dynmoe = dynmoe
        self.first_state: Mapping[str, float] = {"threshold": initial_threshold}
        self.settings: Mapping[str, float] = (
            {} if dynmoe.threshold is None else {"threshold": dynmoe.threshold}
        )

    def cap(self, training: bool) -> int | None:
        dynmoe = self.dynmoe
        return dynmoe.max_experts_per_token if training else dynmoe.inference_max_experts_per_token

    def route(
        self, logits_TE: Tensor, state: Mapping[str, Tensor], *, training: bool, **batch: Any
    ) -> Routing:
        override = None if training else self.dynmoe.inference_threshold
        return kernels.choose_route(logits_TE)(
            logits_TE,
            state["threshold"] if override is None else override,
            max_experts=self.cap(training),
            renormalize=self.dynmoe.weights == "renormalized",
            **batch,
        )
