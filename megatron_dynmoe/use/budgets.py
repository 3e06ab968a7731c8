"""Measures the curve by which a model can be asked for a mean number of experts, and asks for one.

A budget between two points gets a threshold on the line between theirs (:func:`threshold_at`). The
count is no line: it stays near 1 for a while, and then bends. So a pass measures what the middle
of each two neighbors gives, and becomes a point itself if that is not what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from megatron_dynmoe.huggingface.budgets_dynmoe import threshold_at
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.use.calibrate import Calibration, Measurement, Point, Threshold, tolerance

# How far, relatively, the count in the middle of two points may be from what was asked for.
CLOSE_ENOUGH = 0.02
# Passes between two budgets; each of them halves a part of the range.
EXTRA_POINTS = 8


class MeasuredCurve(NamedTuple):
    """What was measured of a curve of budgets.

    Attributes:
        points: ascending.
        rough: the parts, from a number of experts to another, whose middles were not measured
            because all passes between two budgets had been taken; ascending. The count of a budget
            in one of them is somewhere in it, too.
    """

    points: list[Point]
    rough: list[tuple[float, float]]

    def note(self) -> str | None:
        """What to say of the parts that are rough, and what to do; None: there are none."""
        if not self.rough:
            return None
        low, high = max(self.rough, key=lambda part: part[1] / part[0])
        parts = ", ".join(f"{low:.4g} to {high:.4g}" for low, high in self.rough)
        return (
            f"--budgets: {EXTRA_POINTS} passes between two budgets were not enough from {parts} "
            f"experts per token: there the count may be more than {CLOSE_ENOUGH * 100:g} % off "
            f"what is asked for, and at most {(high / low - 1) * 100:.0f} %. Add a budget from "
            f"there, such as {(low + high) / 2:.4g}: it brings as many passes on each side of it"
        )


def points_of(found: Sequence[Calibration]) -> list[Point]:
    """The points of calibrations with one threshold each, in the order of their targets.

    Raises:
        ValueError: a larger target has no larger threshold.
    """
    points = []
    for each in found:
        assert isinstance(each.threshold, float)
        points.append(Point(each.target, each.threshold, each.measurement))
    for one, more in pairwise(points):
        if more.threshold <= one.threshold:
            raise ValueError(
                f"--budgets: {one.experts:g} and {more.experts:g} experts per token have the "
                f"thresholds {one.threshold:g} and {more.threshold:g}, measured to "
                f"{tolerance(more.experts):.4g} experts: leave one out, or give more --tokens"
            )
    return points


def refine(
    points: Sequence[Point], measure_at: Callable[[Threshold, str], Measurement]
) -> MeasuredCurve:
    """Add measured points until the middle of each two neighbors gives what it is asked for.

    It does so to :data:`CLOSE_ENOUGH`, with at most :data:`EXTRA_POINTS` passes between two of the
    given points, in the widest part first.

    Args:
        points: at least one, ascending.
        measure_at: runs a pass with a threshold; the text labels the pass.
    """
    found = {point.experts: point for point in points}
    rough = []
    for below, above in pairwise(points):
        parts = _wide([(below.experts, above.experts)])
        for _ in range(EXTRA_POINTS):
            if not parts:
                break
            low, high = parts.pop(0)
            middle = (low + high) / 2
            threshold = threshold_at([found[low].to_json(), found[high].to_json()], middle)
            measured = measure_at(threshold, f"between {low:g} and {high:g}")
            if abs(measured.experts - middle) <= CLOSE_ENOUGH * middle:
                continue
            # If the count is still that of an end, the line had better begin here.
            experts = min(max(round(measured.experts, 6), low), high)
            found[experts] = Point(experts, threshold, measured)
            parts = _wide([*parts, (low, experts), (experts, high)])
        rough += sorted(parts)
    return MeasuredCurve(sorted(found.values(), key=lambda point: point.experts), rough)


def _wide(parts: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those in which a count may be far from what is asked for, the widest first."""
    wide = [(low, high) for low, high in parts if high - low > CLOSE_ENOUGH * low]
    return sorted(wide, key=lambda part: part[0] - part[1])


def set_budget(config: Any, budget: float | None, asked_by: str = "--budget") -> None:
    """Let the model of a config use a mean number of experts per token; None: its own routing.

    Args:
        asked_by: what names the budget, for messages.

    Raises:
        UsageError: the config has no curve, or the curve does not have this budget.
    """
    if budget is None:
        return
    curve = getattr(config, "budget_curve", None)
    try:
        threshold_at(curve, budget, None if curve is None else config.cap(training=False))
    except ValueError as error:
        raise UsageError(f"{asked_by}: {error}") from error
    config.inference_experts_per_token = budget


def keep_to_config(model: Any) -> None:
    """Make a budget that generation_config.json asks for the model's, unless config.json has one.

    Else ``generate`` would use another number of experts than a mere forward.
    """
    budget = getattr(model.generation_config, "experts_per_token", None)
    if budget is not None and hasattr(model, "set_budget"):  # another's class knows no such word
        model.set_budget(model.config.inference_experts_per_token or budget)
