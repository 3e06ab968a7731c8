"""The routers' state against its bounds, and against the law that moved it."""

from __future__ import annotations

import math
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megatron_dynmoe.control.pi import PIController
from megatron_dynmoe.control.settle import errors_of
from megatron_dynmoe.conversion.megatron.checkpoint import MegatronCheckpoint
from megatron_dynmoe.conversion.names import router_entry
from megatron_dynmoe.conversion.routing_settings import state_entries
from megatron_dynmoe.data.finding import FAILED, PASSED, Check
from megatron_dynmoe.doctor.checkpoint.checks.progress import has_trained
from megatron_dynmoe.doctor.checkpoint.checks.threshold_map import check_map
from megatron_dynmoe.doctor.checkpoint.reading.parts import numbers
from megatron_dynmoe.moe.rules import RULES
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.routings import ROUTINGS
from megatron_dynmoe.settings.upstream_flags import layers_with_experts

_NAME = "router state"
_OTHER = "take another iteration; trained on, the count would leave its target for a while"
# The law is computed in float32 from numbers that were rounded to it.
_ROUNDING = 2e-6
_NEIGHBOURS = 8

Scalars = Mapping[str, Mapping[int, float]]  # by name and layer


def check_router_state(
    scalars: Scalars, args: Namespace, iteration: int, folder: Path
) -> Iterator[Check]:
    """What the routers keep besides their parameters, if the run routed dynamically.

    Args:
        scalars: the rule's state (of top-p, ``threshold``), ``integral`` and ``measured``, by layer
            from 0; of a name with several values as ``thresholds[0]`` and so on.

    Raises:
        ValueError: the saved arguments hold settings that make no sense.
    """
    settings = getattr(args, "moe_dynamic_settings", None)
    if settings is None:
        yield Check(_NAME, PASSED, "none: stock top-k")
        return
    dynmoe = DynMoEConfig.from_dict(settings, source="the saved arguments")
    if hasattr(args, "seed"):  # a converted checkpoint names none
        dynmoe = dynmoe.seeded(args.seed)
    sparse = layers_with_experts(args.moe_layer_freq, args.num_layers, "moe_layer_freq")
    layers = [layer for layer, has_experts in enumerate(sparse) if has_experts]
    rule = RULES[dynmoe.routing]
    found = [*_missing(scalars, dynmoe.routing, layers)]
    if not found:
        found = [
            *_out_of_bounds(scalars, dynmoe, args.num_experts, has_trained(args, iteration)),
            *_against_the_law(scalars, dynmoe, args, iteration),
            *_of_another_step(scalars, dynmoe.routing, folder),
        ]
    for text in found:
        yield Check(_NAME, FAILED, f"{folder}: {text}", _OTHER)
    if not found:
        shown = "no number that is controlled"
        if rule.knob is not None:
            values = scalars[rule.knob].values()
            shown = f"{rule.knob} {min(values):.4f}"
            shown += "" if min(values) == max(values) else f" to {max(values):.4f}"
        measured = sum(scalars["measured"].values()) / len(layers)
        last = (
            f"{measured:.3f} experts per token measured last" if measured else "no batch measured"
        )
        yield Check(_NAME, PASSED, f"{shown}, {last}")


def _values_of(scalars: Scalars, name: str) -> Iterator[tuple[str, Mapping[int, float]]]:
    """The values of a name by layer, once or, if it has several, for each of them."""
    several = [key for key in scalars if key.startswith(f"{name}[")]
    for key in several or [name]:
        yield key, scalars.get(key, {})


def _missing(scalars: Scalars, routing: str, layers: list[int]) -> Iterator[str]:
    for name, values in (each for n in state_entries(routing) for each in _values_of(scalars, n)):
        if lacking := set(layers) - values.keys():
            yield f"{name} of layer {numbers(lacking)} is missing"
        wrong = [layer for layer, value in values.items() if not math.isfinite(value)]
        if wrong:
            yield f"{name} of layer {numbers(wrong)} is not finite"


def _out_of_bounds(
    scalars: Scalars, dynmoe: DynMoEConfig, num_experts: int, has_measured: bool
) -> Iterator[str]:
    low, high = _bounds(dynmoe)
    knob, least = RULES[dynmoe.routing].knob, ROUTINGS[dynmoe.routing].least_experts
    most = dynmoe.max_experts_per_token or num_experts
    for layer, value in scalars[knob].items() if knob is not None else ():
        if not low - _ROUNDING <= value <= high + _ROUNDING:
            yield f"{knob} of layer {layer} is {value:g}, out of its bounds {low:g} to {high:g}"
    for layer, value in scalars["measured"].items() if has_measured else ():
        if not least - _ROUNDING <= value <= most + _ROUNDING:
            yield f"measured of layer {layer} is {value:g}: a token uses {least} to {most} experts"


def _against_the_law(
    scalars: Scalars, dynmoe: DynMoEConfig, args: Namespace, iteration: int
) -> Iterator[str]:
    knob = RULES[dynmoe.routing].knob
    if knob is None:
        return
    knobs = scalars[knob]
    if not dynmoe.is_controlled:
        if dynmoe.threshold is None:
            return  # the rule moves it
        fixed = torch.tensor(dynmoe.threshold).item()
        for layer, value in knobs.items():
            if value != fixed:
                yield f"{knob} of layer {layer} is {value:g}, the saved arguments say {fixed:g}"
        return
    if dynmoe.scope == "global":
        for name in (knob, "integral"):
            if len(different := set(scalars[name].values())) > 1:
                yield f"{name} has {len(different)} values, and scope 'global' has one"
                return
    if dynmoe.drawn_target is not None:
        yield from check_map(scalars, dynmoe, args, iteration)
        return
    law = _law(dynmoe, args.num_experts)
    if law is None:
        return
    low, high = law.integral_bounds
    for layer, value in scalars["integral"].items():
        if not low - _ROUNDING * (1 - low) <= value <= high + _ROUNDING * (1 + high):
            yield f"integral of layer {layer} is {value:g}, out of its bounds {low:g} to {high:g}"
            return
    schedule = dynmoe.target_experts_per_token
    assert schedule is not None
    if not has_trained(args, iteration) or (args.fp16 and len(schedule.targets) > 1):
        return  # nothing was measured yet; or a skipped step may have kept an earlier target
    layers = sorted(knobs)
    measured_L = torch.tensor([scalars["measured"][layer] for layer in layers], dtype=torch.float64)
    if dynmoe.scope == "global":
        measured_L = measured_L.mean().expand(len(layers))
    integral_L = torch.tensor([scalars["integral"][layer] for layer in layers])
    sign = RULES[dynmoe.routing].direction
    target = schedule.at(iteration - 1)
    error_L = law.error(sign * measured_L, sign * target).float()
    for layer, expected in zip(layers, law.threshold_at(error_L, integral_L).tolist(), strict=True):
        if abs(knobs[layer] - expected) > _ROUNDING * max(1, abs(expected)):
            yield (
                f"{knob} of layer {layer} is {knobs[layer]:.6f}, and the controller's law "
                f"gives {expected:.6f} for its integral and measured count: they are not of one "
                "step"
            )
            return


def _law(dynmoe: DynMoEConfig, num_experts: int) -> PIController | None:
    """The controller of a run; None if its settings were not settled."""
    names = ("initial_threshold", "proportional_gain", "integral_gain")
    first, proportional, integral = (getattr(dynmoe, name) for name in names)
    if not all(isinstance(value, float) for value in (first, proportional, integral)):
        return None
    return PIController(
        num_experts, first, proportional, integral, *_bounds(dynmoe), errors_of(dynmoe)
    )


def _bounds(dynmoe: DynMoEConfig) -> tuple[float, float]:
    low, high = dynmoe.min_threshold, dynmoe.max_threshold
    lowest, highest = ROUTINGS[dynmoe.routing].knob_range
    return lowest if low is None else low, highest if high is None else high


def _of_another_step(scalars: Scalars, routing: str, folder: Path) -> Iterator[str]:
    """Another iteration of the run with the very same state: one was copied over the other."""
    others = [path for path in folder.parent.glob("iter_*") if path.name != folder.name]
    others.sort(key=lambda path: abs(_number(path) - _number(folder)))
    kept = (each for name in state_entries(routing) for each in _values_of(scalars, name))
    here = {key: dict(values) for key, values in kept}
    for path in others[:_NEIGHBOURS]:
        if _state_in(path, routing) == here:
            yield f"the state of the routers is that of {path.name}, to the last bit"


def _number(folder: Path) -> int:
    digits = folder.name.removeprefix("iter_")
    return int(digits) if digits.isdecimal() else 0


def _state_in(folder: Path, routing: str) -> dict[str, dict[int, float]] | None:
    """The state of the routers in another checkpoint; None if it cannot be read."""
    try:
        checkpoint = MegatronCheckpoint(folder)
        num_layers, frequency = checkpoint.args.num_layers, checkpoint.args.moe_layer_freq
        sparse = layers_with_experts(frequency, num_layers, "moe_layer_freq")
        state: dict[str, dict[int, float]] = defaultdict(dict)
        for name in state_entries(routing):
            for layer in range(num_layers):
                if sparse[layer]:
                    key, index = checkpoint.find((router_entry(name),), layer)
                    values = checkpoint.read(key, index).flatten().tolist()
                    for place, value in enumerate(values):
                        state[name if len(values) == 1 else f"{name}[{place}]"][layer] = value
        return dict(state)
    except (ValueError, OSError, AttributeError):
        return None  # it is of another format or damaged, which is not what was asked
