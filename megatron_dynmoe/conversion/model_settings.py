"""The config of a model, in the middle between Megatron's words and each format's.

A *config* is a plain dict with the fields of our own format's configuration
(:class:`DynMoEModelConfig`), which can express everything that is converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from megatron_dynmoe.control.settle import settle
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.schedule import TargetSchedule

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
# What kind of value a setting has, under the names of any format.
_COUNTS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "intermediate_size"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts"),
    *("num_local_experts", "num_experts_per_tok", "expert_frequency"),
)
_NUMBERS = (
    *("initializer_range", "rms_norm_eps", "attention_dropout", "hidden_dropout", "rope_theta"),
    *("partial_rotary_factor", "top_p_threshold", "router_aux_loss_coef", "router_jitter_noise"),
)
_FLAGS = (
    *("attention_bias", "qk_norm", "tie_word_embeddings", "shared_expert_gate"),
    *("output_router_logits", "use_cache"),
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LISTS = ("mlp_layer_types", "theta", "measured_experts_per_token")
_MAPPINGS = ("rope_parameters", "rope_scaling", "controller")
_NEVER_NULL = {
    *(*_COUNTS[:4], "max_position_embeddings", *_NUMBERS[:4], "top_p_threshold"),
    *("router_aux_loss_coef", *_FLAGS),
}
RouterState = dict[str, list[float | None]]


class Needed(NamedTuple):
    """The only value of a setting that can be converted, and what any other would mean."""

    name: str
    value: Any
    otherwise: str
    own_remedy: str = ""

    @property
    def remedy(self) -> str:
        """How a training command gets the value."""
        return self.own_remedy or f"leave out --{self.name.replace('_', '-')}"


def check_kinds(values: dict[str, Any]) -> None:
    """Whether the settings that are there have values of their kind; others are not looked at.

    Raises:
        ValueError: one has not; the message names it.
    """
    for names, fits, kind in (
        (_COUNTS, _is_count, "a whole number from 1"),
        (_NUMBERS, _is_from_zero, "a number from 0"),
        (_FLAGS, lambda value: isinstance(value, bool), "true or false"),
        (_LISTS, lambda value: isinstance(value, list), "a list"),
        (_MAPPINGS, lambda value: isinstance(value, dict), "names and values"),
        (("bos_token_id", "pad_token_id"), _is_token_id, "a token id"),
        (("eos_token_id",), _are_token_ids, "a token id, or a list of some"),
    ):
        for name in names:
            value = values.get(name)
            no_experts = name == "num_experts" and value == 0
            may_be_null = name not in values or name not in _NEVER_NULL
            if not (fits(value) or no_experts or (value is None and may_be_null)):
                raise ValueError(f"{name} is {value!r}: use {kind}.")
    if values.get("rope_parameters"):
        check_kinds(values["rope_parameters"])


def check_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the defaults of what it leaves out, checked as for use.

    Raises:
        ValueError: a setting makes no sense, alone or with another.
    """
    from megatron_dynmoe.huggingface.configuration_dynmoe import DynMoEModelConfig

    check_kinds(config)
    checked = DynMoEModelConfig.from_dict(config).to_dict()
    if not checked["rope_parameters"].get("rope_theta"):
        raise ValueError("rope_parameters has no rope_theta.")
    return checked


def routing_config(settings: dict[str, Any], state: RouterState) -> dict[str, Any]:
    """The routing part of the config, from resolved settings and the state of the routers."""
    dynmoe = DynMoEConfig.from_dict(settings, source="the checkpoint")
    routing = {name: getattr(dynmoe, name) for name in _ROUTING}
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
            "balance_loss": config["balance_loss"],
            "balance_loss_coeff": config["balance_loss_coeff"],
        }
        if kept["num_experts_per_tok"] is None:
            raise ValueError(
                f"routing is 'top_k', but the model was trained with {config['routing']!r}, which "
                "knows no k: choose top_p or dtop_p."
            )
        return config | NO_ROUTING | kept
    dynmoe, first = settled(dynmoe, config)
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


def rope_type(config: dict[str, Any]) -> str:
    """The kind of rotary positions: default, or one of those that are scaled."""
    return config["rope_parameters"].get("rope_type", "default")


def rope_of(theta: float, partial: float) -> dict[str, Any]:
    """The config's ``rope_parameters``."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    return rope if partial == 1 else rope | {"partial_rotary_factor": partial}


def kinds_of_layers(sparse: Sequence[bool]) -> list[str]:
    """A config's ``mlp_layer_types``, from whether each layer has experts."""
    return ["sparse" if has_experts else "dense" for has_experts in sparse]


def layer_frequency(sparse: list[bool]) -> int | list[int]:
    """N where every N-th layer has experts, from the first on; else the pattern."""
    for every in range(1, len(sparse) + 1):
        if sparse == [layer % every == 0 for layer in range(len(sparse))]:
            return every
    return [int(kind) for kind in sparse]


def per_layer(config: dict[str, Any], name: str) -> list[float | None]:
    """A setting of every layer, None for those without experts."""
    value = config[name]
    return value if isinstance(value, list) else _where_sparse(config, value)


def _where_sparse(config: dict[str, Any], value: float) -> list[float | None]:
    return [value if kind == "sparse" else None for kind in config["mlp_layer_types"]]


def _number_if_constant(schedule: TargetSchedule | None) -> float | str | None:
    if schedule is None:
        return None
    text = str(schedule)
    return text if ":" in text else float(text)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63


def _is_token_id(value: Any) -> bool:
    return type(value) is int and -1 <= value < 2**63  # -1: none, in older files


def _are_token_ids(value: Any) -> bool:
    return all(map(_is_token_id, value if isinstance(value, list) and value else [value]))


def _is_from_zero(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= 1e300  # and not NaN


def shown(value: Any) -> str:
    """A value as a message has it."""
    return repr(value) if isinstance(value, str) else str(value)
