"""What the settings of a model's configuration have to satisfy, alone and together.

Exported models ship with this file.
"""

from __future__ import annotations

import math
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_dynmoe.huggingface.budgets_dynmoe import check_curve, is_number
from megatron_dynmoe.layers.moe import BALANCE_LOSSES
from megatron_dynmoe.layers.rules import LAYER_RULES, LayerRule

ROUTING_NAMES = ("top_k", "top_p", "dtop_p", *LAYER_RULES)

# What top-p and DTop-p have, and what other rules have. Those that are in no list, all have.
TOP_P_ONLY = ("threshold", "inference_threshold", "inference_experts_per_token", "budget_curve")
OF_RULES_ONLY = ("router_state", "rule_settings")
DYNAMIC_ONLY = (
    *TOP_P_ONLY,
    *OF_RULES_ONLY,
    "max_experts_per_token",
    "inference_max_experts_per_token",
    "target_experts_per_token",
)

CHOICES: dict[str, tuple[str, ...]] = {
    "hidden_act": ("silu",),
    "routing": ROUTING_NAMES,
    "normalization": ("none", "drn"),
    "weights": ("raw", "renormalized"),
    "router_dtype": ("float32", "bfloat16", "float16"),
    "balance_loss": BALANCE_LOSSES,
}


def check_settings(config: Any) -> None:
    """Check all settings of a model's configuration.

    Raises:
        ValueError: a setting makes no sense, alone or with another.
    """
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} is {getattr(config, name)!r}: use {' or '.join(choices)}.")
    _check_shape(config)
    if config.has_experts:
        _check_selection(config)
    for name in ("balance_loss_coeff", "dynamic_loss_coeff"):
        if not is_number(getattr(config, name)) or getattr(config, name) < 0:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}: use 0 (off) or a positive number."
            )
    if config.theta is not None and config.normalization != "drn":
        raise ValueError(
            f"theta is given, but normalization is {config.normalization!r}, which has none: set "
            "normalization to 'drn', or leave theta out."
        )
    for name in ("theta", "measured_experts_per_token"):
        if getattr(config, name) is not None:
            _check_per_layer(config, name, getattr(config, name))


def _check_shape(config: Any) -> None:
    positive = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    positive += ["num_key_value_heads", "head_dim"]
    if config.has_experts:
        positive += ["num_experts", "moe_intermediate_size"]
    for name in positive:
        if not _is_count(getattr(config, name)):
            raise ValueError(f"{name} is {getattr(config, name)!r}: use a whole number from 1.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads is {config.num_key_value_heads}: use a divisor of "
            f"num_attention_heads ({config.num_attention_heads})."
        )
    _check_length(config, "mlp_layer_types", config.mlp_layer_types)
    for layer, kind in enumerate(config.mlp_layer_types):
        if kind not in ("sparse", "dense"):
            raise ValueError(f"mlp_layer_types[{layer}] is {kind!r}: use sparse or dense.")
    if "dense" in config.mlp_layer_types and not _is_count(config.intermediate_size):
        raise ValueError(
            f"intermediate_size is {config.intermediate_size!r}, but layer "
            f"{config.mlp_layer_types.index('dense')} is dense: give its ffn size."
        )
    if config.shared_expert_gate and config.shared_expert_intermediate_size is None:
        raise ValueError(
            "shared_expert_gate is on, but there is no shared expert: set "
            "shared_expert_intermediate_size, or leave the gate out."
        )
    for name, value in config.rope_parameters.items():
        if isinstance(value, dict):
            raise ValueError(
                f"rope_parameters has values for {name} alone: give rope_type and rope_theta for "
                "all layers."
            )
    rope_type = config.rope_parameters.get("rope_type", "default")
    known = ("default", *ROPE_INIT_FUNCTIONS)
    if rope_type not in known:
        raise ValueError(f"rope_parameters has rope_type {rope_type!r}: use {' or '.join(known)}.")
    part = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if is_number(part) and 2 * math.ceil(int(config.head_dim * part) / 2) > config.head_dim:
        raise ValueError(
            f"head_dim is {config.head_dim} and partial_rotary_factor {part:g}: rotary positions "
            "turn pairs of numbers, so use an even head_dim and a factor up to 1."
        )


def _check_selection(config: Any) -> None:
    if config.routing == "top_k":
        for name in DYNAMIC_ONLY:
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(config, name)!r}, which routing 'top_k' does not have: "
                    "set another routing, or leave it out."
                )
        _check_experts(config, "num_experts_per_tok", config.num_experts_per_tok)
        return
    given = vars(config)["num_experts_per_tok"]
    if given is not None:
        raise ValueError(
            f"num_experts_per_tok is {given!r}, which routing "
            f"{config.routing!r} does not have: use max_experts_per_token for a cap, or set "
            "routing to 'top_k'."
        )
    for name in ("max_experts_per_token", "inference_max_experts_per_token"):
        if getattr(config, name) is not None:
            _check_experts(config, name, getattr(config, name))
    for name in OF_RULES_ONLY if config.rule is None else TOP_P_ONLY:
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, which routing {config.routing!r} does not "
                "have: leave it out."
            )
    if config.rule is not None:
        _check_rule(config, config.rule)
        return
    if config.inference_threshold is not None:
        checked_threshold("inference_threshold", config.inference_threshold)
    if isinstance(config.threshold, (list, tuple)):
        _check_per_layer(config, "threshold", config.threshold)
        for layer, threshold in enumerate(config.threshold):
            if threshold is not None:
                checked_threshold("threshold", threshold, layer)
    else:
        checked_threshold("threshold", config.threshold)
    if config.budget_curve is not None:
        check_curve(config.budget_curve, config.num_experts)
    if config.inference_experts_per_token is not None:
        config.threshold_of_budget(config.inference_experts_per_token)


def _check_rule(config: Any, rule: LayerRule) -> None:
    settings, state = config.rule_settings or {}, config.router_state or {}
    for kind, given, wanted in (
        ("rule_settings", settings, rule.settings),
        ("router_state", state, rule.state),
    ):
        if set(given) != set(wanted):
            raise ValueError(
                f"{kind} has {', '.join(sorted(given)) or 'nothing'}, and routing "
                f"{config.routing!r} has {', '.join(sorted(wanted)) or 'nothing'} there."
            )
    for name, value in rule.fixed.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, and routing {config.routing!r} knows "
                f"{value!r} only: leave it out."
            )
    most = max(config.cap(training) or config.num_experts for training in (True, False))
    for name, (allowed, is_allowed) in rule.settings.items():
        if not is_allowed(settings[name], most):
            raise ValueError(f"rule_settings[{name!r}] is {settings[name]!r}: use {allowed}.")
    for name, length in rule.lengths(config.num_experts).items():
        _check_length(config, f"router_state[{name!r}]", state[name])
        for layer, values in enumerate(state[name]):
            where = f"router_state[{name!r}][{layer}]"
            if not config.is_sparse(layer):
                if values is not None:
                    raise ValueError(
                        f"{where} is {values!r}, but layer {layer} is dense: use null."
                    )
            elif not (
                isinstance(values, (list, tuple))
                and len(values) == length
                and all(map(is_number, values))
            ):
                raise ValueError(f"{where} is {values!r}: use a list of {length} numbers.")


def _check_experts(config: Any, name: str, value: Any) -> None:
    if not _is_count(value) or value > config.num_experts:
        raise ValueError(
            f"{name} is {value!r}: use 1 to {config.num_experts} (the number of experts)."
        )


def _check_length(config: Any, name: str, values: Any) -> None:
    if not isinstance(values, (list, tuple)) or len(values) != config.num_hidden_layers:
        raise ValueError(
            f"{name} is {values!r}: use a list with one entry for each of the "
            f"{config.num_hidden_layers} layers."
        )


def _check_per_layer(config: Any, name: str, values: Any) -> None:
    """Check a list of one number for each sparse and None for each dense layer."""
    _check_length(config, name, values)
    for layer, value in enumerate(values):
        if config.is_sparse(layer) and not is_number(value):
            raise ValueError(f"{name}[{layer}] is {value!r}: use a number.")
        if not config.is_sparse(layer) and value is not None:
            raise ValueError(f"{name}[{layer}] is {value!r}, but layer {layer} is dense: use null.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def checked_threshold(name: str, value: Any, layer: int | None = None) -> float:
    if not is_number(value) or not 0 <= value <= 1:
        where = name if layer is None else f"{name}[{layer}]"
        raise ValueError(
            f"{where} is {value!r}: it is a cumulative probability, so use 0 (one expert) to 1 "
            "(all experts)."
        )
    return value
