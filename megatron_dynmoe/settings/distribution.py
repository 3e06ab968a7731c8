"""A target of the controller that is drawn anew for every global batch."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from megatron_dynmoe.settings.messages.refusals import SettingError
from megatron_dynmoe.settings.schedule import TargetSchedule

# What a router has for each knot: its target, its threshold and the sum of its errors.
KNOTS = ("knot_targets", "knot_thresholds", "knot_integrals")

_NAME = "target_experts_per_token"
_CALL = re.compile(r"\s*(\w+)\s*\((.*)\)\s*")


@dataclass(frozen=True)
class TargetDistribution:
    """The target number of experts per token, drawn uniformly from a range.

    The draw of a step depends on ``seed`` and the step alone. So it is the same on all ranks and
    after a restart, and no generator has a state to save. It is stratified: of every
    :attr:`STRATA` steps in a row, each has its own part of the range, in an order that is drawn
    too. Each draw by itself is uniform over the range. The mean over many steps varies much less
    than that of independent draws, and so does what a step costs; and no part of the range waits
    for its turn for long.

    The controller keeps a threshold for each of :attr:`NUM_KNOTS` targets, the *knots*, which are
    evenly spaced in the logarithm of the target. In between, thresholds are linear in it.
    """

    STRATA: ClassVar[int] = 16
    NUM_KNOTS: ClassVar[int] = 5

    low: float
    high: float
    seed: int = 1234  # Megatron's default

    @classmethod
    def parse(cls, text: str) -> TargetDistribution:
        """Read ``uniform(LOW,HIGH)``.

        Raises:
            SettingError: the text has another form, or the range is empty.
        """
        remedy = "use uniform(LOW,HIGH) with LOW below HIGH, such as uniform(1,4)"
        found = _CALL.fullmatch(text)
        name = found[1] if found else None
        if found is None or name != "uniform":
            reason = f", and there is no distribution {name!r}" if name else ""
            if ":" in text:
                reason = ", and no schedule can hold a distribution"
            raise SettingError(_NAME, text, reason, remedy)
        try:
            low, high = (float(bound) for bound in found[2].split(","))
        except ValueError:
            raise SettingError(_NAME, text, "", remedy) from None
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise SettingError(_NAME, text, ", which is no range", remedy)
        return cls(low, high)

    @property
    def targets(self) -> tuple[float, ...]:
        """The least and the largest target."""
        return self.low, self.high

    @property
    def mean(self) -> float:
        """The mean of the targets, which evaluations route at."""
        return (self.low + self.high) / 2

    @property
    def knots(self) -> tuple[float, ...]:
        """The targets that have a threshold of their own, increasing."""
        last, ratio = self.NUM_KNOTS - 1, self.high / self.low
        inner = (self.low * ratio ** (knot / last) for knot in range(1, last))
        return (self.low, *inner, self.high)

    def at(self, iteration: int) -> float:
        """Return the target for the step that follows ``iteration`` finished iterations."""
        block, place = divmod(iteration, self.STRATA)
        return self.low + (self.high - self.low) * _draws(self.seed, block, self.STRATA)[place]

    def at_step(self, step: int) -> float:
        """Return the target for step ``step``, counted from 1: ``step - 1`` had finished before."""
        return self.at(step - 1)

    def place(self, target: float) -> tuple[int, float]:
        """Return the knot at or below a target, and the way to the next one, 0 to 1."""
        return place_between(self.knots, target)

    def seeded(self, seed: int) -> TargetDistribution:
        """The same distribution with a run's seed."""
        return dataclasses.replace(self, seed=seed)

    def __str__(self) -> str:
        low, high = (str(bound).removesuffix(".0") for bound in self.targets)
        return f"uniform({low},{high})"


Target = TargetSchedule | TargetDistribution


def parse_target(text: str | float) -> Target:
    """Read a number, a schedule or a distribution.

    Raises:
        SettingError: the text has another form.
    """
    if isinstance(text, str) and "(" in text:
        return TargetDistribution.parse(text)
    return TargetSchedule.parse(text)


def place_between(knots: tuple[float, ...], target: float) -> tuple[int, float]:
    """Find a target between knots: the knot at or below it, and the way to the next, 0 to 1.

    The way is linear in the logarithm of the target. Targets outside are taken for the nearest end.
    """
    for knot in range(len(knots) - 1):
        low, high = knots[knot], knots[knot + 1]
        if target < high:
            return knot, max(0.0, math.log(target / low) / math.log(high / low))
    return len(knots) - 1, 0.0


@lru_cache(maxsize=8)
def _draws(seed: int, block: int, strata: int) -> tuple[float, ...]:
    """Draw from each of the strata of 0 to 1, in a random order.

    Python guarantees the stream of ``random()`` for a seed that is a string, across versions and
    platforms; it guarantees none for ``shuffle``.
    """
    stream = random.Random(f"target experts per token, seed {seed}, block {block}")
    keys = [stream.random() for _ in range(strata)]
    order = sorted(range(strata), key=keys.__getitem__)
    return tuple((stratum + stream.random()) / strata for stratum in order)
