"""How many experts a token will use: in the long run, in the first steps, at most."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass

from megatron_dynmoe.control.calibrate import initial_experts_per_token
from megatron_dynmoe.moe.rules import RULES
from megatron_dynmoe.settings.arguments import resolved_from_args
from megatron_dynmoe.settings.messages.refusals import FlagError
from megatron_dynmoe.settings.routings import ROUTINGS


@dataclass(frozen=True)
class ExpertCounts:
    """Experts per token.

    Attributes:
        mean: the mean over most of the run.
        first_steps: the mean over the first steps.
        cap: the most experts that a token may use; None for no cap.
        source: the setting or assumption that gives the mean.
        room: rows per token for which memory is allocated, used or not; None: ``margin`` says it.
        on_average: the mean over the run if ``mean`` is not that but the most, for its memory.
        margin: the room beyond the rows that are used in the mean, as a share of them.
    """

    mean: float
    first_steps: float
    cap: int | None
    source: str
    room: int | None = None
    margin: float = 0.0
    on_average: float | None = None

    @property
    def computed(self) -> float:
        """The mean over the run, from which operations and time follow."""
        return self.mean if self.on_average is None else self.on_average

    @property
    def rows_per_token(self) -> tuple[float, float]:
        """Rows per token that take memory, with a balanced load: at the mean and at the start."""
        return self.rows_with_room(self.mean), self.rows_with_room(self.first_steps)

    def rows_with_room(self, experts_per_token: float) -> float:
        """Rows per token that take memory, if tokens use so many experts in the mean."""
        if self.room is not None:
            return self.room
        return min((1 + self.margin) * experts_per_token, self.cap or math.inf)


def expected_counts(args: Namespace, experts_per_token: float | None = None) -> ExpertCounts:
    """Derive the expected counts from the routing's settings.

    Args:
        args: Megatron's arguments, with ours.
        experts_per_token: the mean, if the user knows it.

    Raises:
        ValueError: a setting is wrong, or the given mean is out of range.
    """
    num_experts = args.num_experts or 0
    dynmoe = resolved_from_args(args, num_experts)
    if experts_per_token is not None and not dynmoe.is_dynamic:
        fixed = f"--moe-router-topk is {args.moe_router_topk}" if num_experts else "there are none"
        raise FlagError("experts_per_token", experts_per_token, f", but {fixed}", "leave it out")
    if not num_experts:
        return ExpertCounts(0, 0, None, "no experts")
    cap = dynmoe.max_experts_per_token
    most = cap or num_experts
    least = ROUTINGS[dynmoe.routing].least_experts
    if experts_per_token is not None and not (
        least <= experts_per_token <= most and experts_per_token > 0
    ):
        shown = f"{experts_per_token:g}"
        raise FlagError("experts_per_token", shown, "", f"use {least or 'more than 0'} to {most}")
    if not dynmoe.is_dynamic:
        k = args.moe_router_topk
        if not 1 <= k <= num_experts:
            raise FlagError("moe_router_topk", k, "", f"use 1 to {num_experts}, the experts")
        return ExpertCounts(k, k, k, "top-k")

    def routed(knob: float | None) -> float:
        return initial_experts_per_token(
            rule(dynmoe, knob, num_experts),
            num_experts,
            logits_std=args.init_method_std * math.sqrt(args.hidden_size),
            normalized=dynmoe.normalization == "drn",
        )

    rule, on_average = RULES[dynmoe.routing], None
    if dynmoe.is_controlled:
        target = dynmoe.target_experts_per_token
        assert target is not None
        mean, source = target.targets[-1], "the target"
        start = dynmoe.initial_threshold
        # A computed knob gives the target by construction.
        first = target.at(0)
        if isinstance(start, float):
            first = min(rule.peak * routed(start), most)
        if dynmoe.drawn_target is not None:  # any step may have the largest target
            first, on_average = mean, dynmoe.drawn_target.mean
            source = f"the largest target of {target}, for memory; {on_average:g} for operations"
    else:
        first = routed(dynmoe.threshold)
        mean = max(float(least), first / rule.fall)
        source = "as in the first steps"
        if rule.fall != 1:
            source = f"assumed: the first steps' over {rule.fall:g}"
    if experts_per_token is not None:
        mean, source, on_average = experts_per_token, "--experts-per-token", None
    room = cap if dynmoe.row_buffer == "worst_case" else None
    return ExpertCounts(mean, first, cap, source, room, dynmoe.row_buffer_margin or 0.0, on_average)
