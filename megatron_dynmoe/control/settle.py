"""From the settings that a user gave to those that a model trains with.

This module does not import Megatron, because the converter also uses it, to settle a checkpoint's
first threshold.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any, Protocol

from megatron_dynmoe.control import calibrate
from megatron_dynmoe.control.pi import SIGN, PIController
from megatron_dynmoe.control.pi_map import MapController
from megatron_dynmoe.moe.rules import RULES, Rule
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.distribution import TargetDistribution
from megatron_dynmoe.settings.routings import ROUTINGS

# The factor by which the response of the count may grow before the loop becomes unstable.
MIN_GAIN_MARGIN = 3.0
# At a target of 1 any small threshold is right. A knot there starts where the count begins to rise,
# so that the thresholds between this knot and the next are right, too.
_LEAST_START = 1.05

ControlLaw = PIController | MapController


class ModelSizes(Protocol):
    """What the computed values need from a model's configuration, under Megatron's names."""

    num_moe_experts: int
    hidden_size: int
    init_method_std: float


def settle(resolved: DynMoEConfig, model: ModelSizes) -> tuple[DynMoEConfig, ControlLaw | None]:
    """Compute every ``auto`` from the model's configuration.

    Args:
        resolved: the result of :meth:`DynMoEConfig.resolve`.
        model: the model's shape.

    Returns:
        Settings without ``auto`` and, for ``dtop_p``, the controller; else None. If the target is
        drawn, its knots have the computed values, and the settings keep ``auto``.

    Raises:
        ValueError: a setting contradicts another one or the model.
    """
    if not resolved.is_controlled:
        return resolved, None
    control, plant = resolved.control, _plant(resolved, model)
    if resolved.drawn_target is not None:
        return resolved, _map_controller(resolved, resolved.drawn_target, plant)
    targets, low, high = control.target.targets, control.min_threshold, control.max_threshold
    first, proportional = control.initial_threshold, control.proportional_gain
    integral = control.integral_gain
    if isinstance(first, str):  # auto, as may be the gains
        first = min(max(calibrate.initial_threshold(target=targets[0], **plant), low), high)
    if isinstance(proportional, str) or isinstance(integral, str):
        computed = _gains(targets, plant)
        proportional = computed[0] if isinstance(proportional, str) else proportional
        integral = computed[1] if isinstance(integral, str) else integral
    controller = PIController(
        model.num_moe_experts, first, proportional, integral, low, high, errors_of(resolved)
    )
    settled = dataclasses.replace(
        resolved,
        initial_threshold=controller.initial_threshold,
        proportional_gain=controller.proportional_gain,
        integral_gain=controller.integral_gain,
    )
    return settled, controller


def errors_of(dynmoe: DynMoEConfig) -> str:
    """What the law of a run takes for the error of a batch."""
    return SIGN if dynmoe.control_law == "sign" else ROUTINGS[dynmoe.routing].errors


def settled_gain_margin(
    settled: DynMoEConfig, controller: PIController, model: ModelSizes
) -> float:
    """Compute the gain margin of settled settings at the target with the steepest response.

    It is infinite if the routing's response is not computed from normal logits.
    """
    if not ROUTINGS[settled.routing].is_calibrated:
        return math.inf
    gains = controller.proportional_gain, controller.integral_gain
    return _gain_margin(gains, settled.control.target.targets, _plant(settled, model))


def _plant(resolved: DynMoEConfig, model: ModelSizes) -> dict[str, Any]:
    """Collect what the count's response to the knob depends on, except the target."""
    return {
        "routing": resolved.routing,
        "num_experts": model.num_moe_experts,
        "normalized": resolved.normalization == "drn",
        "logits_std": _logits_std(model),
        "max_experts": resolved.max_experts_per_token,
    }


def started_rule(dynmoe: DynMoEConfig, controller: ControlLaw | None, model: ModelSizes) -> Rule:
    """Build the rule of a run, with its state of the first step.

    Args:
        dynmoe, controller: the result of :func:`settle`, with dynamic routing.
        model: the model's shape.

    Raises:
        SettingError: the rule cannot do what a setting asks for.
    """
    first = controller.initial_threshold if controller else dynmoe.threshold
    rule = RULES[dynmoe.routing](dynmoe, first, model.num_moe_experts)
    rule.start(1.0 if dynmoe.normalization == "drn" else _logits_std(model))
    return rule


def _logits_std(model: ModelSizes) -> float:
    """The standard deviation of the gate's logits in the first step."""
    # The gate reads normalized hidden states of root mean square 1.
    return model.init_method_std * math.sqrt(model.hidden_size)


def _gain_margin(
    gains: tuple[float, float], targets: tuple[float, ...], plant: dict[str, Any]
) -> float:
    steepest = max(calibrate.plant_slope(target=target, **plant) for target in targets)
    return calibrate.gain_margin(*gains, steepest, plant["num_experts"])


def _gains(targets: tuple[float, ...], plant: dict[str, Any]) -> tuple[float, float]:
    """Compute the default gains at the last target of a schedule, which holds for most of the run.

    The gains are reduced if another target responds so much more strongly that the loop would come
    too close to instability.
    """
    gains = calibrate.default_gains(target=targets[-1], **plant)
    scale = min(1.0, _gain_margin(gains, targets, plant) / MIN_GAIN_MARGIN)
    return gains[0] * scale, gains[1] * scale


def _map_controller(
    resolved: DynMoEConfig, drawn: TargetDistribution, plant: dict[str, Any]
) -> MapController:
    """Compute the start and the default gains of every knot, each from the response there.

    The gains are reduced if the response between two knots is so much stronger than at them that
    the loop would come too close to instability.
    """
    low, high = resolved.control.min_threshold, resolved.control.max_threshold
    knots = drawn.knots
    slopes = [calibrate.plant_slope(target=knot, **plant) for knot in knots]
    halfway = [math.sqrt(a * b) for a, b in pairwise(knots)]
    # Both neighbors get the same share of an error halfway, so their gains count half each.
    stronger = [
        calibrate.plant_slope(target=target, **plant) * (1 / a + 1 / b) / 2
        for target, (a, b) in zip(halfway, pairwise(slopes), strict=True)
    ]
    gains = [calibrate.default_gains(target=knot, **plant) for knot in knots]
    margin = calibrate.gain_margin(*gains[0], slopes[0], plant["num_experts"]) / max(1, *stronger)
    scale = min(1.0, margin / MIN_GAIN_MARGIN)
    laws = []
    for knot, (proportional, integral) in zip(knots, gains, strict=True):
        start = min(max(knot, _LEAST_START), drawn.high)
        first = min(max(calibrate.initial_threshold(target=start, **plant), low), high)
        laws.append(
            PIController(
                plant["num_experts"], first, scale * proportional, scale * integral, low, high
            )
        )
    return MapController(knots, tuple(laws), RULES[resolved.routing].direction)
