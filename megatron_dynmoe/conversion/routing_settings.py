"""Converts between a model's config and the settings and state of its routers in training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_dynmoe.control.pi_map import MapController
from megatron_dynmoe.control.settle import ControlLaw, settle, started_rule
from megatron_dynmoe.conversion.model_settings import (
    NO_ROUTING,
    ROUTING,
    extra_logits,
    per_layer,
    where_sparse,
)
from megatron_dynmoe.layers.rules import LAYER_RULES
from megatron_dynmoe.moe.rules import RULES, Rule
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.distribution import (
    KNOTS,
    Target,
    TargetDistribution,
    parse_target,
    place_between,
)
from megatron_dynmoe.settings.routings import ROUTINGS

_OF_ALL_RULES = ("integral", "measured")
_CONTROLLER = (
    "scope",
    "proportional_gain",
    "integral_gain",
    "initial_threshold",
    "min_threshold",
    "max_threshold",
)
# All that routers keep besides their parameters, whatever their rule is.
STATE = tuple(
    sorted({*(name for rule in RULES.values() for name in rule.entries), *_OF_ALL_RULES, *KNOTS})
)
# By name, a value for each layer, None for layers without experts. Of a target that is drawn, also
# the lists that KNOTS names, with a number for each knot.
RouterState = dict[str, list[Any]]
_NEUTRAL = {
    "normalization": "none",
    "weights": "raw",
    "dynamic_loss_coeff": 0.0,
    "balance_loss_coeff": 0.0,
}
# Points of the exported curve from one knot of the map to the next.
_POINTS_PER_KNOT = 2


def check_routing(routing: str) -> None:
    """Refuse a routing that no format has, before anything of its checkpoint is read.

    Raises:
        ValueError: it is such a routing.
    """
    exported = [name for name, kind in ROUTINGS.items() if kind.is_exported]
    if routing not in exported:
        raise ValueError(
            f"routing is {routing!r}, which no format has: only models with "
            f"{', '.join(exported)} can be converted."
        )


def routing_config(settings: dict[str, Any], state: RouterState) -> dict[str, Any]:
    """The routing part of the config, from resolved settings and the state of the routers."""
    dynmoe = DynMoEConfig.from_dict(settings, source="the checkpoint")
    check_routing(dynmoe.routing)
    # What a routing does not have is in its config as that which changes nothing.
    absent = {name: value for name, value in _NEUTRAL.items() if getattr(dynmoe, name) is None}
    routing = {name: getattr(dynmoe, name) for name in ROUTING} | absent
    target = _number_if_constant(dynmoe.target_experts_per_token)
    controller = None
    if dynmoe.is_controlled:
        controller = {name: getattr(dynmoe, name) for name in _CONTROLLER}
        controller["integral"] = state["integral"]
        if dynmoe.drawn_target is not None and KNOTS[0] in state:
            controller["map"] = {name: state[name] for name in KNOTS}
    measured, rule = state["measured"], LAYER_RULES.get(dynmoe.routing)
    return routing | {
        "threshold": state["threshold"] if rule is None else None,
        "router_state": None if rule is None else {name: state[name] for name in rule.state},
        "rule_settings": None
        if rule is None or not rule.settings
        else {name: getattr(dynmoe, name) for name in rule.settings},
        "theta": state["theta"] if dynmoe.normalization == "drn" else None,
        "target_experts_per_token": target,
        "controller": controller,
        "measured_experts_per_token": measured if any(measured) else None,
        "num_experts_per_tok": None,
        "budget_curve": _budget_curve(dynmoe, state),
        "inference_experts_per_token": None,
    }


def _budget_curve(dynmoe: DynMoEConfig, state: RouterState) -> list[dict[str, Any]] | None:
    """``budget_curve``: thresholds for the range of targets of the training, both rising.

    None if there was no such range, or no threshold that all layers share, or if the target was
    not the mean number of experts.
    """
    drawn = dynmoe.drawn_target
    maps = [values for values in state.get("knot_thresholds", ()) if values is not None]
    if drawn is None or dynmoe.controlled_quantity == "busiest_rank":
        return None
    if not maps or any(values != maps[0] for values in maps):
        return None
    knots = tuple(next(values for values in state["knot_targets"] if values is not None))
    num_points, ratio = _POINTS_PER_KNOT * (len(knots) - 1), knots[-1] / knots[0]
    curve: list[dict[str, Any]] = []
    for point in range(num_points + 1):
        target = float(f"{knots[0] * ratio ** (point / num_points):.4g}")
        knot, way = place_between(knots, target)
        upper = maps[0][min(knot + 1, len(knots) - 1)]
        threshold = shortest((1 - way) * maps[0][knot] + way * upper)
        if not curve or threshold > curve[-1]["threshold"]:
            curve.append({"experts_per_token": target, "threshold": threshold, "loss": None})
    return curve


def settings_from_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """The resolved settings for training; None for stock top-k."""
    if config["routing"] == "top_k":
        return None
    takes = ("routing", *ROUTINGS[config["routing"]].takes)
    settings = {name: config.get(name) for name in ROUTING if name in takes}
    settings |= config.get("rule_settings") or {}
    if config["routing"] == "top_p":
        thresholds = {value for value in per_layer(config, "threshold") if value is not None}
        if len(thresholds) != 1:
            raise ValueError(
                f"threshold is {config['threshold']}: with routing 'top_p' training has one fixed "
                "threshold for all layers; give one number, or train with --routing dtop_p "
                "--scope layer."
            )
        settings["threshold"] = thresholds.pop()
    elif "target_experts_per_token" in ROUTINGS[config["routing"]].takes:
        settings["target_experts_per_token"] = config["target_experts_per_token"]
    if ROUTINGS[config["routing"]].is_controlled:
        settings |= {name: (config.get("controller") or {}).get(name) for name in _CONTROLLER}
    if settings["balance_loss"] == "none":
        settings["balance_loss_coeff"] = None
    given = {name: value for name, value in settings.items() if value is not None}
    return settled(DynMoEConfig.from_dict(given, source="config.json"), config)[0].to_dict()


def settled(dynmoe: DynMoEConfig, config: dict[str, Any]) -> tuple[DynMoEConfig, Rule]:
    """Settings for a model of this config, every ``auto`` computed, and the rule at the start."""
    dynmoe, controller = _settle(dynmoe, config)
    return dynmoe, started_rule(dynmoe, controller, _sizes(config))


def state_entries(routing: str) -> tuple[str, ...]:
    """The names of a router's state in a training with this routing, without those of a map."""
    return (*RULES[routing].entries, *_OF_ALL_RULES)


def router_state(config: dict[str, Any]) -> RouterState:
    """The routers' state in every layer, None for layers without experts."""
    controller = config.get("controller") or {}
    own = config.get("router_state") or {"threshold": per_layer(config, "threshold")}
    state: RouterState = own | {
        "integral": controller.get("integral") or where_sparse(config, 0.0),
        "measured": config.get("measured_experts_per_token") or where_sparse(config, 0.0),
    }
    if not is_drawn(config):
        return state
    return state | (controller.get("map") or _first_map(config))


def is_drawn(config: dict[str, Any]) -> bool:
    """Whether the target of a config's training is drawn anew for each batch."""
    target = config.get("target_experts_per_token")
    return isinstance(target, str) and isinstance(parse_target(target), TargetDistribution)


def _settle(dynmoe: DynMoEConfig, config: dict[str, Any]) -> tuple[DynMoEConfig, ControlLaw | None]:
    return settle(dynmoe.resolve(config["num_experts"]), _sizes(config))


def _sizes(config: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(
        num_moe_experts=config["num_experts"],
        hidden_size=config["hidden_size"],
        init_method_std=config["initializer_range"],
    )


def _first_map(config: dict[str, Any]) -> RouterState:
    """The map at the start of a training, for each layer with experts."""
    settings = settings_from_config(config)
    assert settings is not None
    _, law = _settle(DynMoEConfig.from_dict(settings, source="config.json"), config)
    assert isinstance(law, MapController)
    first = (law.knots, law.initial_map, [0.0] * len(law.knots))
    return {
        name: where_sparse(config, [shortest(value) for value in values])
        for name, values in zip(KNOTS, first, strict=True)
    }


def with_routing(config: dict[str, Any], dynmoe: DynMoEConfig) -> dict[str, Any]:
    """The config with another routing, whose state is that of a training's start."""
    check_routing(dynmoe.routing)
    if not dynmoe.is_dynamic:
        kept = {
            "num_experts_per_tok": config.get("num_experts_per_tok"),
            "weights": config["weights"],
            "balance_loss": config["balance_loss"],
            "balance_loss_coeff": config["balance_loss_coeff"],
        }
        if kept["num_experts_per_tok"] is None:
            raise ValueError(
                f"routing is 'top_k', but the model was trained with {config['routing']!r}, which "
                "knows no k: choose another."
            )
        return config | NO_ROUTING | kept
    dynmoe, rule = settled(dynmoe, config)
    first = {
        name: [shortest(value) for value in values] for name, values in rule.first_state.items()
    }
    if (rows := rule.extra_logits) != (there := extra_logits(config)):
        raise ValueError(
            f"routing is {dynmoe.routing!r}, whose gate has {rows} rows beside those of the "
            f"experts, and the model's gate has {there}: train such a model from its start."
        )
    state: RouterState = {
        name: where_sparse(config, values if dynmoe.routing in LAYER_RULES else values[0])
        for name, values in first.items()
    } | {
        "integral": where_sparse(config, 0.0),
        "measured": where_sparse(config, 0.0),
        "theta": where_sparse(config, 1.0),
    }
    config = config | routing_config(dynmoe.to_dict(), state) | {"router_dtype": "float32"}
    if is_drawn(config):
        config["controller"]["map"] = _first_map(config)
    return config


def shortest(value: float) -> float:
    """The shortest decimal number that is this value in float32: 0.4, not 0.4000000059604645."""
    return float(str(np.float32(value)))


def _number_if_constant(target: Target | None) -> float | str | None:
    if target is None:
        return None
    text = str(target)
    return text if set(text) & {":", "("} else float(text)
