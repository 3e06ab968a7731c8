"""Converts between a model's config and the settings and state of its routers in training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_dynmoe.control.settle import settle
from megatron_dynmoe.conversion.model_settings import (
    NO_ROUTING,
    ROUTING,
    per_layer,
    where_sparse,
)
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.routings import ROUTINGS
from megatron_dynmoe.settings.schedule import TargetSchedule

_CONTROLLER = (
    "scope",
    "proportional_gain",
    "integral_gain",
    "initial_threshold",
    "min_threshold",
    "max_threshold",
)
RouterState = dict[str, list[float | None]]


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
    routing = {name: getattr(dynmoe, name) for name in ROUTING}
    schedule = dynmoe.target_experts_per_token
    target = _number_if_constant(schedule)
    controller = None
    if dynmoe.is_controlled:
        controller = {name: getattr(dynmoe, name) for name in _CONTROLLER}
        controller["integral"] = state["integral"]
    measured = state["measured"]
    return routing | {
        "threshold": state["threshold"],
        "theta": state["theta"] if dynmoe.normalization == "drn" else None,
        "target_experts_per_token": target,
        "controller": controller,
        "measured_experts_per_token": measured if any(measured) else None,
        "num_experts_per_tok": None,
        "budget_curve": None,
        "inference_experts_per_token": None,
    }


def settings_from_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """The resolved settings for training; None for stock top-k."""
    if config["routing"] == "top_k":
        return None
    settings = {name: config.get(name) for name in ROUTING}
    if config["routing"] == "top_p":
        thresholds = {value for value in per_layer(config, "threshold") if value is not None}
        if len(thresholds) != 1:
            raise ValueError(
                f"threshold is {config['threshold']}: with routing 'top_p' training has one fixed "
                "threshold for all layers; give one number, or train with --routing dtop_p "
                "--scope layer."
            )
        settings["threshold"] = thresholds.pop()
    else:
        settings["target_experts_per_token"] = config["target_experts_per_token"]
        settings |= {name: (config.get("controller") or {}).get(name) for name in _CONTROLLER}
    if settings["balance_loss"] == "none":
        settings["balance_loss_coeff"] = None
    given = {name: value for name, value in settings.items() if value is not None}
    return settled(DynMoEConfig.from_dict(given, source="config.json"), config)[0].to_dict()


def settled(dynmoe: DynMoEConfig, config: dict[str, Any]) -> tuple[DynMoEConfig, float]:
    """Settings for a model of this config, every ``auto`` computed, and the first threshold."""
    model = SimpleNamespace(
        num_moe_experts=config["num_experts"],
        hidden_size=config["hidden_size"],
        init_method_std=config["initializer_range"],
    )
    dynmoe, controller = settle(dynmoe.resolve(config["num_experts"]), model)
    first = controller.initial_threshold if controller else dynmoe.threshold
    assert first is not None
    return dynmoe, first


def router_state(config: dict[str, Any]) -> RouterState:
    """Threshold, integral and measured mean of every layer, None for layers without experts."""
    integral = (config.get("controller") or {}).get("integral")
    return {
        "threshold": per_layer(config, "threshold"),
        "integral": integral or where_sparse(config, 0.0),
        "measured": config.get("measured_experts_per_token") or where_sparse(config, 0.0),
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
    dynmoe, first = settled(dynmoe, config)
    state: RouterState = {
        "threshold": where_sparse(config, shortest(first)),
        "integral": where_sparse(config, 0.0),
        "measured": where_sparse(config, 0.0),
        "theta": where_sparse(config, 1.0),
    }
    return config | routing_config(dynmoe.to_dict(), state) | {"router_dtype": "float32"}


def shortest(value: float) -> float:
    """The shortest decimal number that is this value in float32: 0.4, not 0.4000000059604645."""
    return float(str(np.float32(value)))


def _number_if_constant(schedule: TargetSchedule | None) -> float | str | None:
    if schedule is None:
        return None
    text = str(schedule)
    return text if ":" in text else float(text)
