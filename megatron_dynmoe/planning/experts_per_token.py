"""How many experts a token will use: in the long run, in the first steps, at most."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass

from megatron_dynmoe.control.calibrate import initial_experts_per_token
from megatron_dynmoe.settings.arguments import resolved_from_args

# A fixed threshold starts at about this many times its later count. With 16 experts Dynamic MoE
# reports 1.8 and 2.3 for 0.4 and 0.5 (table 7), and the counts at the start are 5.9 and 7.2.
FIXED_THRESHOLD_FALL = 3.0


@dataclass(frozen=True)
class ExpertCounts:
    """Experts per token.

    Attributes:
        mean: the mean over most of the run.
        first_steps: the mean over the first steps.
        cap: the most experts that a token may use; None for no cap.
        source: the setting or assumption that gives the mean.
        room: rows per token for which memory is allocated, used or not; None: only for used rows.
    """

    mean: float
    first_steps: float
    cap: int | None
    source: str
    room: int | None = None

    @property
    def rows_per_token(self) -> tuple[float, float]:
        """Rows per token that take memory, with a balanced load: at the mean and at the start."""
        return (self.mean, self.first_steps) if self.room is None else (self.room, self.room)


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
    if not num_experts:
        return ExpertCounts(0, 0, None, "no experts")
    cap = dynmoe.max_experts_per_token
    most = cap or num_experts
    if experts_per_token is not None and not 1 <= experts_per_token <= most:
        raise ValueError(f"--experts-per-token is {experts_per_token:g}: use 1 to {most}.")
    if not dynmoe.is_dynamic:
        k = args.moe_router_topk
        if not 1 <= k <= num_experts:
            raise ValueError(f"--moe-router-topk is {k}: use 1 to {num_experts}, the experts.")
        return ExpertCounts(k, k, k, "top-k")

    def at_threshold(threshold: float) -> float:
        return initial_experts_per_token(
            num_experts,
            threshold,
            logits_std=args.init_method_std * math.sqrt(args.hidden_size),
            normalized=dynmoe.normalization == "drn",
            max_experts=cap,
        )

    if dynmoe.is_controlled:
        schedule = dynmoe.target_experts_per_token
        assert schedule is not None
        mean, source = schedule.points[-1][1], "the target"
        start = dynmoe.initial_threshold
        # A computed threshold gives the target by construction.
        first = at_threshold(start) if isinstance(start, float) else schedule.at(0)
    else:
        assert dynmoe.threshold is not None
        first = at_threshold(dynmoe.threshold)
        mean, source = (
            max(1.0, first / FIXED_THRESHOLD_FALL),
            "assumed: a third of the first steps'",
        )
    if experts_per_token is not None:
        mean, source = experts_per_token, "--experts-per-token"
    room = cap if dynmoe.row_buffer == "worst_case" else None
    return ExpertCounts(mean, first, cap, source, room)
