"""The target of the controller as a function of the iteration."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from megatron_dynmoe.settings.messages.refusals import SettingError


@dataclass(frozen=True)
class TargetSchedule:
    """The target number of experts per token as a piecewise linear function of the iteration.

    ``points`` are (iteration, target), with strictly increasing iterations. The target is constant
    before the first point and after the last. A plain number is a schedule of one point.
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def parse(cls, text: str | float) -> TargetSchedule:
        """Read ``2``, or ``0:8,1000:2`` (iteration:target, linear in between).

        Raises:
            SettingError: the text has another form, or the iterations do not increase.
        """
        refusal = SettingError(
            "target_experts_per_token",
            text,
            "",
            "use a number such as 2, a schedule ITERATION:TARGET,... such as 0:8,1000:2 with "
            "increasing iterations, or a distribution such as uniform(1,4)",
        )
        try:
            if isinstance(text, bool):  # YAML reads yes as True, and float(True) is 1
                raise ValueError
            if ":" not in str(text):
                points: tuple[tuple[int, float], ...] = ((0, float(text)),)
            else:
                pairs = [point.split(":") for point in str(text).split(",")]
                points = tuple((int(iteration), float(target)) for iteration, target in pairs)
        except (OverflowError, TypeError, ValueError):
            raise refusal from None
        if not all(math.isfinite(target) for _, target in points):
            raise refusal
        iterations = [iteration for iteration, _ in points]
        if iterations[0] < 0 or any(b <= a for a, b in pairwise(iterations)):
            raise refusal
        return cls(points)

    @property
    def targets(self) -> tuple[float, ...]:
        """The targets of all points."""
        return tuple(target for _, target in self.points)

    def at(self, iteration: int) -> float:
        """Return the target for the step that follows ``iteration`` finished iterations."""
        index = bisect_right([start for start, _ in self.points], iteration)
        if index == 0:
            return self.points[0][1]
        if index == len(self.points):
            return self.points[-1][1]
        (i0, t0), (i1, t1) = self.points[index - 1], self.points[index]
        return t0 + (t1 - t0) * (iteration - i0) / (i1 - i0)

    def at_step(self, step: int) -> float:
        """Return the target for step ``step``, counted from 1: ``step - 1`` had finished before."""
        return self.at(step - 1)

    def __str__(self) -> str:
        targets = [str(target).removesuffix(".0") for _, target in self.points]
        iterations = [iteration for iteration, _ in self.points]
        if iterations == [0]:
            return targets[0]
        return ",".join(f"{i}:{target}" for i, target in zip(iterations, targets, strict=True))
