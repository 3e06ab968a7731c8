"""Min-p: the experts with at least a share of the largest probability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron_dynmoe.moe.rules.rule import Rule
from megatron_dynmoe.routing.route import Routing, route_by


class MinP(Rule):
    """A larger share takes fewer experts; the best expert is always one of them."""

    knob, direction, entries = "share", -1, ("share",)

    def route(
        self,
        logits_TE: Tensor,
        state: Mapping[str, Tensor],
        *,
        training: bool,
        group: Any,  # no token's experts depend on another token
        **batch: Any,
    ) -> Routing:
        def select(probs_TE: Tensor) -> Tensor:
            chosen_TE = probs_TE >= state["share"] * probs_TE.max(dim=-1, keepdim=True).values
            chosen_TE[:, 0] |= ~chosen_TE.any(dim=-1)  # a token with NaN has the first expert
            return chosen_TE

        return route_by(select, logits_TE, renormalize=True, **batch)

    @staticmethod
    def crossings(logits_TE: Tensor, max_experts: int | None) -> Tensor:
        """The shares below which a token has its second, third, ... expert."""
        probs_TE = logits_TE.softmax(dim=-1).sort(dim=-1, descending=True).values
        return probs_TE[:, 1:max_experts] / probs_TE[:, :1]
