"""The config of a model, in the middle between Megatron's words and each format's.

A *config* is a plain dict with the fields of our own format's configuration
(:class:`DynMoEModelConfig`), which can express everything that is converted.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.control.settle import settle

_CONTROLLER = (
    "scope",
    "proportional_gain",
    "integral_gain",
    "initial_threshold",
    "min_threshold",
    "max_threshold",
)
_ROUTING = (
    "routing",
    "max_experts_per_token",
    "normalization",
    "weights",
    "dynamic_loss_coeff",
    "balance_loss",
    "balance_loss_coeff",
    "inference_threshold",
    "inference_max_experts_per_token",
)
NO_ROUTING = dict.fromkeys(_ROUTING) | {
    "routing": "top_k",
    "normalization": "none",
    "weights": "renormalized",
    "balance_loss": "none",
    "threshold": None,
    "theta": None,
    "target_experts_per_token": None,
    "controller": None,
    "measured_experts_per_token": None,
    "num_experts_per_tok": None,
}
RouterState = dict[str, list[float | None]]


class Needed(NamedTuple):
    """The only value of a setting that can be converted, and what any other would mean."""

    name: str
    value: Any
    otherwise: str


def routing_config(settings: dict[str, Any], state: RouterState) -> dict[str, Any]:
    """The routing part of the config, from resolved settings and the state of the routers."""
    dynmoe = DynMoEConfig.from_dict(settings, source="the checkpoint")
    routing = {name: getattr(dynmoe, name) for name in _ROUTING}
    schedule = dynmoe.target_experts_per_token
    target = None if schedule is None else str(schedule)
    controller = None
    if dynmoe.is_controlled:
        controller = {name: getattr(dynmoe, name) for name in _CONTROLLER}
        controller["integral"] = state["integral"]
    measured = state["measured"]
    return routing | {
        "threshold": state["threshold"],
        "theta": state["theta"] if dynmoe.normalization == "drn" else None,
        "target_experts_per_token": float(target) if _is_number(target) else target,
        "controller": controller,
        "measured_experts_per_token": measured if any(measured) else None,
        "num_experts_per_tok": None,
    }


def settings_from_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """Resolved settings for the trainer; None for stock top-k."""
    if config["routing"] == "top_k":
        return None
    settings = {name: config.get(name) for name in _ROUTING}
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
    given = {name: value for name, value in settings.items() if value is not None}
    return settled(DynMoEConfig.from_dict(given, source="config.json"), config).to_dict()


def settled(dynmoe: DynMoEConfig, config: dict[str, Any]) -> DynMoEConfig:
    """Resolved settings for a model of this config, with every ``auto`` computed."""
    model = SimpleNamespace(
        num_moe_experts=config["num_experts"],
        hidden_size=config["hidden_size"],
        init_method_std=config["initializer_range"],
    )
    return settle(dynmoe, model)[0]


def router_state(config: dict[str, Any]) -> RouterState:
    """Threshold, integral and measured mean of every layer, None for those without experts."""
    integral = (config.get("controller") or {}).get("integral")
    return {
        "threshold": per_layer(config, "threshold"),
        "integral": integral or _where_sparse(config, 0.0),
        "measured": config.get("measured_experts_per_token") or _where_sparse(config, 0.0),
    }


def with_routing(config: dict[str, Any], dynmoe: DynMoEConfig) -> dict[str, Any]:
    """The config with another routing, its state as at the start of training."""
    if not dynmoe.is_dynamic:
        kept = {
            "num_experts_per_tok": config.get("num_experts_per_tok"),
            "weights": config["weights"],
        }
        if kept["num_experts_per_tok"] is None:
            raise ValueError(
                f"routing is 'top_k', but the model was trained with {config['routing']!r}, which "
                "knows no k: choose top_p or dtop_p."
            )
        return config | NO_ROUTING | kept
    dynmoe = settled(dynmoe, config)
    first = dynmoe.threshold if dynmoe.threshold is not None else dynmoe.initial_threshold
    state: RouterState = {
        "threshold": _where_sparse(config, shortest(first)),
        "integral": _where_sparse(config, 0.0),
        "measured": _where_sparse(config, 0.0),
        "theta": _where_sparse(config, 1.0),
    }
    return config | routing_config(dynmoe.to_dict(), state) | {"router_dtype": "float32"}


def shortest(value: float) -> float:
    """The shortest decimal number that is this value in float32: 0.4, not 0.4000000059604645."""
    return float(str(np.float32(value)))


def rope_theta(config: dict[str, Any]) -> float:
    """The base of the rotary positions."""
    return config["rope_parameters"]["rope_theta"]


def partial_rotary_factor(config: dict[str, Any]) -> float:
    """The part of a head that is rotated."""
    return config["rope_parameters"].get("partial_rotary_factor", 1.0)


def rope_of(theta: float, partial: float) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    return rope if partial == 1 else rope | {"partial_rotary_factor": partial}


def kinds_of_layers(frequency: int | list[int], num_layers: int, dense: bool) -> list[str]:
    if dense:
        return ["dense"] * num_layers
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in range(num_layers)]
    return ["sparse" if sparse else "dense" for sparse in frequency]


def layer_frequency(sparse: list[bool]) -> int | list[int]:
    """N where every N-th layer has experts, from the first on; else the pattern."""
    for every in range(1, len(sparse) + 1):
        if sparse == [layer % every == 0 for layer in range(len(sparse))]:
            return every
    return [int(kind) for kind in sparse]


def per_layer(config: dict[str, Any], name: str) -> list[float | None]:
    value = config[name]
    return value if isinstance(value, list) else _where_sparse(config, value)


def _where_sparse(config: dict[str, Any], value: float) -> list[float | None]:
    return [value if kind == "sparse" else None for kind in config["mlp_layer_types"]]


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and float(text) > 0
    except ValueError:
        return False


def shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
