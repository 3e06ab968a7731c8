"""Rules of routing, one a file: how logits become weights and a routing map.

A router holds one rule. It brings the logits and whatever the rule keeps, and takes the result to
the losses, the counters and the experts; the controller moves the rule's knob.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from megatron_dynmoe.moe.rules.top_p import TopP
from megatron_dynmoe.routing.route import Routing
from megatron_dynmoe.settings.config import DynMoEConfig


class Rule(Protocol):
    """What a router, the controller and a checkpoint have to know of a rule.

    Attributes:
        knob: the name in ``first_state`` of the one number that a controller may move, or None.
        direction: 1 if the count rises with the knob, -1 if it falls.
        first_state: what the rule keeps, by name, at the start of training. The router holds each
            as a float32 buffer [1] that is saved with the model; the controller's sum of errors
            and the measured count join them. A controller's step commits all of these at once.
        settings: the part of ``first_state`` that the user has fixed, which is taken from there
            and not from a checkpoint.
    """

    knob: str | None
    direction: int
    first_state: Mapping[str, float]
    settings: Mapping[str, float]

    def cap(self, training: bool) -> int | None:
        """The most experts of a token, or None."""

    def route(
        self,
        logits_TE: Tensor,
        state: Mapping[str, Tensor],
        *,
        theta: Tensor | None,
        num_sequences: int,
        valid_T: Tensor | None,
        training: bool,
    ) -> Routing:
        """Weights and map of one micro-batch, and the sums over tokens that losses and counts need.

        Args:
            logits_TE: [T, E] float32, as the gate has made them.
            state: of ``first_state``, as it is now.
            theta: [1], the scale of normalized logits; None: they are not normalized.
            num_sequences: B; tokens are ordered as ``position * B + sequence``.
            valid_T: [T], bool, False for padding; None: no padding.
            training: False in evaluation and inference.
        """


# By --moe-dynamic-routing: from resolved settings and the knob's first value to a rule.
RULES: dict[str, Callable[[DynMoEConfig, Any], Rule]] = {"top_p": TopP, "dtop_p": TopP}
