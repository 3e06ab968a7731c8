"""Rules of routing, one per file: how logits become weights and a routing map.

A router holds one rule. It gives the rule the logits and the rule's state, and passes the result on
to the losses, the counters and the experts. The controller moves the rule's knob.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from megatron_dynmoe.moe.rules.top_p import TopP
from megatron_dynmoe.routing.route import Routing
from megatron_dynmoe.settings.config import DynMoEConfig


class Rule(Protocol):
    """What a router, the controller and a checkpoint have to know about a rule.

    Attributes:
        knob: the name in ``first_state`` of the one number that a controller may move, or None.
        direction: 1 if the count rises with the knob, -1 if it falls.
        first_state: the rule's state at the start of training, by name. The router holds each value
            as a float32 buffer [1] that is saved with the model, beside the controller's sum of
            errors and the measured count. A controller's step commits all of these at once.
        settings: the part of ``first_state`` that the user has fixed. These values replace those of
            a checkpoint.
    """

    knob: str | None
    direction: int
    first_state: Mapping[str, float]
    settings: Mapping[str, float]

    def cap(self, training: bool) -> int | None:
        """The most experts that a token may use, or None."""

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
        """Route one micro-batch, and sum over its tokens what losses and counts need.

        Args:
            logits_TE: [T, E] float32, the gate's output after z-loss.
            state: the current values under the names of ``first_state``.
            theta: [1], the scale of normalized logits; None: they are not normalized.
            num_sequences: B; tokens are ordered as ``position * B + sequence``.
            valid_T: [T], bool, False for padding; None: no padding.
            training: False in evaluation and inference.
        """


# The rule of each --moe-dynamic-routing, built from resolved settings and the knob's first value.
RULES: dict[str, Callable[[DynMoEConfig, Any], Rule]] = {"top_p": TopP, "dtop_p": TopP}
