"""The controller's first knob and its gains, computed from normal logits before step 1.

The rule of the routing gives the counts. The knob is what the controller moves: of DTop-p, the
threshold.

Letters: T tokens, E experts, K = min(E, max_experts) the most experts that a token can use.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_dynmoe.moe.rules import RULES, Rule
from megatron_dynmoe.routing.crossings import crossings
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.select import most_experts, select
from megatron_dynmoe.settings.routings import ROUTINGS

# Loop gains K * slope / num_experts. docs/controller.md derives the choice: the loop settles to
# 2 % in about 24 steps and stays stable until the slope is 7.7 times the computed one.
PROPORTIONAL_LOOP_GAIN = 0.05
INTEGRAL_LOOP_GAIN = 0.16
# A router becomes sharper as it learns: the standard deviation of its logits (theta, if they are
# normalized) grows, say to this. The loop keeps this margin there, also at targets at which the
# slope grows by more than the margin of the first step.
SHARP = 3.0
MARGIN_WHEN_SHARP = 1.5

_POPULATION_LOGITS = 2**20
_POPULATION_SEED = 20251213


def mean_experts_per_token(
    probs_TE: Tensor, threshold: Tensor | float, max_experts: int | None = None
) -> Tensor:
    """Compute the mean number of experts per token that top-p selects, a 0-d tensor.

    Args:
        probs_TE: [T, E] float32 or float64, the router's probabilities.
        threshold: a number or a tensor of one element; 0 gives 1 expert, 1 or more gives K.
        max_experts: cap on the experts of a token; None for no cap.
    """
    return select(probs_TE, threshold, max_experts).sum() / len(probs_TE)


def threshold_for_target(probs_TE: Tensor, target: float, max_experts: int | None = None) -> float:
    """Find the threshold at which these probabilities give ``target`` mean experts per token.

    The result is exact up to the resolution 1 / T of a mean over T tokens. If cumulative
    probabilities tie, the mean jumps, and no threshold gives the values in between. The result is
    then the threshold at the jump.

    Args:
        probs_TE: [T, E] float32 or float64, the router's probabilities.
        target: mean experts per token, from 1 (threshold 0) to K (threshold 1).
        max_experts: cap on the experts of a token; None for no cap.

    Raises:
        ValueError: target or max_experts is out of range.
    """
    _check_target(target, probs_TE.shape[1], max_experts)
    points = crossings(probs_TE, max_experts).flatten()
    return _knob_at(points, len(probs_TE), target - 1, (0.0, 1.0))


def initial_threshold(
    num_experts: int,
    target: float,
    logits_std: float = 1.0,
    normalized: bool = True,
    max_experts: int | None = None,
    theta: float = 1.0,
    routing: str = "dtop_p",
) -> float:
    """Compute the knob that gives ``target`` on normal logits, rounded to 4 decimals.

    Args:
        num_experts: routed experts of a layer, E.
        target: mean experts per token, from 1 to K; more than 0 if the routing allows tokens
            without an expert.
        logits_std: standard deviation of the router's logits; it has no effect if ``normalized``.
        normalized: whether dynamic routing normalization is applied: mean 0 and population
            standard deviation 1 over a token's experts, times theta.
        max_experts: cap on the experts of a token; None for no cap.
        theta: scale of the normalized logits; it has no effect unless ``normalized``.
        routing: the routing whose knob it is.

    Raises:
        ValueError: an argument is out of range.
    """
    return _operating_point(
        num_experts, target, logits_std, normalized, max_experts, theta, routing
    )[0]


def initial_experts_per_token(
    rule: Rule, num_experts: int, logits_std: float = 1.0, normalized: bool = True
) -> float:
    """Compute the mean experts per token at the start, by routing normal logits with a run's rule.

    Args:
        rule: with the state of the first step.
        num_experts, logits_std, normalized: as for :func:`initial_threshold`.
    """
    std = 1.0 if normalized else logits_std
    rule.start(std)
    logits_TE = _normal_logits(num_experts + rule.extra_logits, std)
    routed = rule.route(
        logits_TE,
        {name: logits_TE.new_tensor(values) for name, values in rule.first_state.items()},
        theta=logits_TE.new_ones(1) if normalized else None,
        num_sequences=1,
        valid_T=None,
        training=True,
        group=None,
    )
    return float(routed.experts_T.sum() / len(logits_TE))


def plant_slope(
    num_experts: int,
    target: float,
    logits_std: float = 1.0,
    normalized: bool = True,
    max_experts: int | None = None,
    theta: float = 1.0,
    routing: str = "dtop_p",
) -> float:
    """Compute the gain in mean experts per token per unit of the knob, near ``target``.

    It is the slope of the secant over the target +- 10 %, at least +- half an expert, within the
    fewest experts of a token and K, on normal logits, without its sign. It is 0 if all tokens use
    as many experts whatever the knob is. Arguments and errors are those of
    :func:`initial_threshold`.
    """
    return _operating_point(
        num_experts, target, logits_std, normalized, max_experts, theta, routing
    )[1]


def default_gains(num_experts: int, target: float, **plant: Any) -> tuple[float, float]:
    """Compute ``K_p`` and ``K_i`` that give the default loop gains on normal logits.

    They are smaller if the margin of a sharp router (:data:`SHARP`) would be less than
    :data:`MARGIN_WHEN_SHARP`, as at targets above a quarter of the experts. Both are 0 if a token
    can use only one expert. Arguments and errors are those of :func:`initial_threshold`.
    """
    slope = plant_slope(num_experts, target, **plant)
    if slope == 0:
        return 0.0, 0.0
    gains = (
        PROPORTIONAL_LOOP_GAIN * num_experts / slope,
        INTEGRAL_LOOP_GAIN * num_experts / slope,
    )
    sharpness = "theta" if plant.get("normalized", True) else "logits_std"
    slope_when_sharp = plant_slope(num_experts, target, **plant | {sharpness: SHARP})
    scale = min(1.0, gain_margin(*gains, slope_when_sharp, num_experts) / MARGIN_WHEN_SHARP)
    return scale * gains[0], scale * gains[1]


def gain_margin(
    proportional_gain: float, integral_gain: float, slope: float, num_experts: int
) -> float:
    """Compute the factor by which the slope may grow before the loop becomes unstable.

    With a margin of 1 or less the loop oscillates without end. Ask for at least 3, because the
    slope changes as the router learns. ``slope`` is the result of :func:`plant_slope`.
    """
    loop_gain = (2 * proportional_gain + integral_gain) * slope / num_experts
    return math.inf if loop_gain == 0 else 2 / loop_gain


def _operating_point(
    num_experts: int,
    target: float,
    logits_std: float,
    normalized: bool,
    max_experts: int | None,
    theta: float,
    routing: str,
) -> tuple[float, float]:
    """Compute knob and slope at the target, rounded to be the same on every platform."""
    # What has no effect becomes 1, so that one result serves all its values.
    std, theta = (1.0, float(theta)) if normalized else (float(logits_std), 1.0)
    population = _Population(num_experts, std, normalized, max_experts, theta, RULES[routing])
    kind = ROUTINGS[routing]
    return _compute_point(population, float(target), kind.knob_range, kind.least_experts)


class _Population(NamedTuple):
    """Normal logits, and the rule that routes them."""

    num_experts: int
    logits_std: float
    normalized: bool
    max_experts: int | None
    theta: float
    rule: type[Rule]


@lru_cache
def _compute_point(
    population: _Population, target: float, ends: tuple[float, float], least: int
) -> tuple[float, float]:
    num_experts, max_experts = population.num_experts, population.max_experts
    _check_target(target, num_experts, max_experts, least)
    # If the count falls with the knob, it rises with the negative knob.
    sign = population.rule.direction
    low_end, high_end = sorted(sign * end for end in ends)
    points, num_tokens = _points(population)
    knob = sign * _knob_at(points, num_tokens, target - least, (low_end, high_end))

    limit = most_experts(num_experts, max_experts)
    if limit == least:
        return knob, 0.0
    # If logits are nearly equal, the count rises in steps of one expert. A band one expert wide
    # averages over such a step.
    half_width = max(0.5, 0.1 * target)
    low, high = max(float(least), target - half_width), min(float(limit), target + half_width)
    ranks = [max(1, round((mean - least) * num_tokens)) for mean in (low, high)]
    at_low, at_high = (float(points.kthvalue(rank).values) for rank in ranks)
    return round(knob, 4), float(f"{(high - low) / (at_high - at_low):.4g}")


@lru_cache(maxsize=1)  # the targets of one run
def _points(population: _Population) -> tuple[Tensor, int]:
    """The crossings of normal logits, a flat tensor that rises with the count, and their tokens."""
    rule = population.rule
    num_logits = population.num_experts + rule.extra_logits
    logits_TE = _normal_logits(num_logits, population.logits_std)
    if population.normalized:
        _check_scale("theta", population.theta)
        logits_TE = normalize(logits_TE, population.theta)
    crossings_TK = rule.crossings(logits_TE, population.max_experts)
    return rule.direction * crossings_TK.flatten(), len(logits_TE)


def _knob_at(crossings: Tensor, num_tokens: int, more: float, ends: tuple[float, float]) -> float:
    """Find the knob above exactly as many crossings (a flat tensor) as there are to be passed.

    Args:
        more: crossings per token, the mean experts beyond the fewest.
    """
    num_passed = round(more * num_tokens)
    if not len(crossings):  # every token uses one expert
        return ends[0]
    if num_passed == 0:
        return ends[0]
    if num_passed == len(crossings):
        return ends[1]
    below, above = (float(crossings.kthvalue(k).values) for k in (num_passed, num_passed + 1))
    return (below + above) / 2


def _normal_logits(num_experts: int, std: float) -> Tensor:
    """Draw a router's normal logits, [T, E] float64; always the same ones.

    NumPy guarantees the stream of ``RandomState`` across versions and platforms. The draw does not
    touch the global generator.
    """
    _check_scale("logits_std", std)
    shape = (_POPULATION_LOGITS // num_experts, num_experts)
    logits_TE = torch.from_numpy(np.random.RandomState(_POPULATION_SEED).standard_normal(shape))
    return logits_TE.mul_(std)


def _check_scale(name: str, scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{name} is {scale}: it must be finite and greater than 0")


def _check_target(target: float, num_experts: int, max_experts: int | None, least: int = 1) -> None:
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}: it must be at least 1")
    limit = most_experts(num_experts, max_experts)
    if not (least <= target <= limit and target > 0):
        raise ValueError(
            f"target is {target}: a token uses between {least} and {limit} of {num_experts} "
            f"experts (max_experts is {max_experts}); choose a target in this range or raise "
            "max_experts"
        )
