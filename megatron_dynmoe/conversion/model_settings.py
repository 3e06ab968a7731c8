"""The config of a model, to and from which Megatron's arguments and every format are converted.

A *config* is a plain dict with the fields of our own format's configuration
(:class:`DynMoEModelConfig`), which can express everything that is converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

from megatron_dynmoe.layers.rules import LAYER_RULES

# The settings of dynamic routing that a config has under their own names.
ROUTING = (
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
NO_ROUTING: dict[str, Any] = dict.fromkeys(ROUTING) | {
    "routing": "top_k",
    "normalization": "none",
    "weights": "renormalized",
    "balance_loss": "none",
    "threshold": None,
    "router_state": None,
    "rule_settings": None,
    "theta": None,
    "target_experts_per_token": None,
    "controller": None,
    "measured_experts_per_token": None,
    "num_experts_per_tok": None,
    "budget_curve": None,
    "inference_experts_per_token": None,
}
# The kinds of values of settings, by the names that several formats share.
_COUNTS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "intermediate_size"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts"),
    "num_experts_per_tok",
)
_NUMBERS = (
    *("initializer_range", "rms_norm_eps", "attention_dropout", "hidden_dropout", "rope_theta"),
    *("partial_rotary_factor", "router_jitter_noise"),
)
_FLAGS = (
    *("attention_bias", "qk_norm", "tie_word_embeddings", "shared_expert_gate"),
    *("output_router_logits", "use_cache"),
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LISTS = ("mlp_layer_types", "theta", "measured_experts_per_token", "budget_curve")
_MAPPINGS = (
    *("rope_parameters", "rope_scaling", "controller"),
    *("router_state", "rule_settings"),
)
_NEVER_NULL = {*_COUNTS[:4], "max_position_embeddings", *_NUMBERS[:4], *_FLAGS}


class Needed(NamedTuple):
    """The only value of a setting that can be converted, and the meaning of other values."""

    name: str
    value: Any
    otherwise: str
    own_remedy: str = ""

    @property
    def remedy(self) -> str:
        """How to give a training command this value."""
        return self.own_remedy or f"leave out --{self.name.replace('_', '-')}"


def check_kinds(
    values: dict[str, Any],
    counts: Iterable[str] = (),
    numbers: Iterable[str] = (),
    flags: Iterable[str] = (),
) -> None:
    """Check that the settings that are given have values of their kind; ignore other keys.

    Args:
        counts: names of further settings that are whole numbers from 1, or null.
        numbers: names of further settings that are numbers from 0, and never null.
        flags: names of further settings that are true or false, and never null.

    Raises:
        ValueError: a value is of another kind; the message names the setting.
    """
    for names, fits, kind in (
        ((*_COUNTS, *counts), _is_count, "a whole number from 1"),
        ((*_NUMBERS, *numbers), _is_from_zero, "a number from 0"),
        ((*_FLAGS, *flags), lambda value: isinstance(value, bool), "true or false"),
        (_LISTS, lambda value: isinstance(value, list), "a list"),
        (_MAPPINGS, lambda value: isinstance(value, dict), "names and values"),
        (("bos_token_id", "pad_token_id"), _is_token_id, "a token id"),
        (("eos_token_id",), _are_token_ids, "a token id, or a list of some"),
    ):
        for name in names:
            value = values.get(name)
            no_experts = name == "num_experts" and value == 0
            may_be_null = name not in values or name not in {*_NEVER_NULL, *numbers, *flags}
            if not (fits(value) or no_experts or (value is None and may_be_null)):
                raise ValueError(f"{name} is {value!r}: use {kind}.")
    for name in ("rope_parameters", "rope_scaling"):
        if values.get(name):
            check_kinds(values[name])


def check_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with defaults for what it leaves out, checked as the model checks it.

    Raises:
        ValueError: a setting makes no sense, alone or with another.
    """
    from megatron_dynmoe.huggingface.configuration_dynmoe import DynMoEModelConfig

    check_kinds(config)
    checked = DynMoEModelConfig.from_dict(config).to_dict()
    if not checked["rope_parameters"].get("rope_theta"):
        raise ValueError("rope_parameters has no rope_theta.")
    return checked


def extra_logits(config: dict[str, Any]) -> int:
    """How many rows a gate has beside those of the experts."""
    rule = LAYER_RULES.get(config["routing"])
    return 0 if rule is None else rule.extra_logits(config["rule_settings"] or {})


def rope_theta(config: dict[str, Any]) -> float:
    """The base of the rotary positions."""
    return config["rope_parameters"]["rope_theta"]


def partial_rotary_factor(config: dict[str, Any]) -> float:
    """The share of a head that is rotated."""
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
    """N if every N-th layer has experts, from the first on; else the whole pattern."""
    for every in range(1, len(sparse) + 1):
        if sparse == [layer % every == 0 for layer in range(len(sparse))]:
            return every
    return [int(kind) for kind in sparse]


def per_layer(config: dict[str, Any], name: str) -> list[float | None]:
    """A setting of every layer, None for layers without experts."""
    value = config[name]
    return value if isinstance(value, list) else where_sparse(config, value)


def where_sparse(config: dict[str, Any], value: Any) -> list[Any]:
    """A value for every layer with experts, None for the others."""
    return [value if kind == "sparse" else None for kind in config["mlp_layer_types"]]


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
    """A value as messages show it."""
    return repr(value) if isinstance(value, str) else str(value)
