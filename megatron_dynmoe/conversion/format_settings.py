"""What ``config.json`` of each format holds, and what a format cannot express."""

from __future__ import annotations

import inspect
from typing import Any

from megatron_dynmoe.conversion.model_settings import (
    NO_ROUTING,
    TOKEN_IDS,
    Needed,
    check_config,
    check_kinds,
    kinds_of_layers,
    layer_frequency,
    partial_rotary_factor,
    per_layer,
    rope_of,
    rope_theta,
    rope_type,
    shown,
    with_routing,
)
from megatron_dynmoe.conversion.words import CARRIED, DEFAULT_IDS, changed, unread
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.upstream_flags import layers_with_experts

# What the published layout of Dynamic MoE has no word for; its own code assumes these values.
NEEDED_BY_DYNAMIC_MOE = (
    Needed("routing", "top_p", "another routing than top-p with a fixed threshold"),
    Needed("normalization", "none", "routing normalization with a theta"),
    Needed("weights", "raw", "renormalized weights"),
    Needed("max_experts_per_token", None, "a cap"),
    Needed("inference_max_experts_per_token", None, "a cap at inference"),
    Needed("inference_threshold", None, "another threshold at inference"),
    Needed("rope_theta", 10000.0, "another rotary base"),
    Needed("partial_rotary_factor", 1.0, "rotary positions in a part of a head"),
    Needed("rope_type", "default", "scaled rotary positions"),
    Needed("attention_bias", False, "biases in attention"),
    Needed("qk_norm", False, "norms of queries and keys"),
    Needed("shared_expert_intermediate_size", None, "shared experts"),
    Needed("tie_word_embeddings", False, "tied embeddings"),
)
NEEDED_BY_MIXTRAL = (
    Needed("routing", "top_k", "a varying number of experts per token"),
    Needed("weights", "renormalized", "raw weights (--moe-router-pre-softmax)"),
    Needed("attention_bias", False, "biases in attention"),
    Needed("qk_norm", False, "norms of queries and keys"),
    Needed("shared_expert_intermediate_size", None, "shared experts"),
    Needed("partial_rotary_factor", 1.0, "rotary positions in a part of a head"),
    Needed("rope_type", "default", "scaled rotary positions"),
)
# What changes the function of a model in a way that training has not.
_NEEDED_OF_FOLDERS = (
    Needed("sliding_window", None, "sliding-window attention"),
    Needed("quantization_config", None, "quantized weights"),
    Needed("attention_bias", False, "biases in attention"),
    Needed("mlp_bias", False, "biases in the experts"),
)
# The words of each format that are read; those of ours are the parameters of its configuration.
_READ_IN_BOTH = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "attention_dropout", "tie_word_embeddings", *CARRIED),
    *(needed.name for needed in _NEEDED_OF_FOLDERS),
}
_READ = {
    "mixtral": _READ_IN_BOTH
    | {"num_key_value_heads", "head_dim", "num_local_experts", "num_experts"}
    | {"num_experts_per_tok", "router_aux_loss_coef"}
    | {"rope_parameters", "rope_scaling", "rope_theta"},
    # The code of that layout has as many keys as heads, and its own rotary positions.
    "dynamic-moe": _READ_IN_BOTH
    | {"num_experts", "expert_frequency", "top_p_threshold", "measured_experts_per_token"},
}


def unread_words(theirs: dict[str, Any], format: str, config: dict[str, Any]) -> dict[str, Any]:
    """The words of a ``config.json`` that say something and have no place in any other format.

    Args:
        config: what was read of it; a word that only repeats what the format's code assumes, such
            as the published layout's rotary base, says nothing.
    """
    if format == "dynmoe":
        from megatron_dynmoe.huggingface.configuration_dynmoe import DynMoEModelConfig

        return unread(theirs, set(inspect.signature(DynMoEModelConfig.__init__).parameters))
    assumed = config | {"rope_theta": rope_theta(config)}
    found = unread(theirs, _READ[format])
    return {name: value for name, value in found.items() if assumed.get(name) != value}


def words_lost_in(config: dict[str, Any], format: str, dtype: str) -> dict[str, Any]:
    """The words of a config that a format leaves out or gives another value."""
    return changed(config, from_format(to_format(config, format, dtype), format))


def to_format(config: dict[str, Any], format: str, dtype: str) -> dict[str, Any]:
    """What ``config.json`` of a format holds.

    Raises:
        ValueError: the format cannot express a setting; the message names it.
    """
    if format == "dynmoe":
        return config | {
            "architectures": ["DynMoEForCausalLM"],
            "model_type": "dynmoe",
            "auto_map": {
                "AutoConfig": "configuration_dynmoe.DynMoEModelConfig",
                "AutoModel": "modeling_dynmoe.DynMoEModel",
                "AutoModelForCausalLM": "modeling_dynmoe.DynMoEForCausalLM",
            },
            "dtype": dtype,
        }
    _check_expressible(config, format)
    shared = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["moe_intermediate_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": config["max_position_embeddings"],
        "initializer_range": config["initializer_range"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_theta": rope_theta(config),
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": dtype,
        **{name: config.get(name) for name in TOKEN_IDS},
        "output_router_logits": config.get("output_router_logits", False),
        "use_cache": config.get("use_cache", True),
    }
    if format == "mixtral":
        return shared | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "head_dim": config["head_dim"],
            "attention_dropout": config["attention_dropout"],
            "num_local_experts": config["num_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
            "router_aux_loss_coef": _loss_of_a_mixtral(config),
            "sliding_window": None,
        }
    sparse = [kind == "sparse" for kind in config["mlp_layer_types"]]
    threshold = next(value for value in per_layer(config, "threshold") if value is not None)
    return shared | {
        "architectures": ["MoEForCausalLM"],
        "model_type": "llama",
        "num_experts": config["num_experts"],
        "experts_topk": 2,  # there in the published file, and unused
        "expert_frequency": layer_frequency(sparse),
        "top_p_threshold": threshold,
        "rope_scaling": None,
        # Not in the published file; its code keeps what it does not know.
        "measured_experts_per_token": config["measured_experts_per_token"],
    }


def format_of(theirs: dict[str, Any]) -> str:
    """Which of the formats a ``config.json`` is of.

    Raises:
        ValueError: none of them.
    """
    kind = theirs.get("model_type")
    if kind in ("dynmoe", "mixtral"):
        return kind
    if theirs.get("architectures") == ["MoEForCausalLM"] or "top_p_threshold" in theirs:
        return "dynamic-moe"
    raise ValueError(
        f"model_type is {kind!r} and architectures {theirs.get('architectures')}: "
        "only dynmoe, mixtral and the published Dynamic MoE layout (architectures "
        "['MoEForCausalLM']) can be read."
    )


def from_format(theirs: dict[str, Any], format: str) -> dict[str, Any]:
    """The config, from what ``config.json`` of a format holds.

    Raises:
        ValueError: a setting is missing or of the wrong kind, or training has nothing like it.
    """
    check_kinds(theirs)
    if format == "dynmoe":
        return check_config(theirs)
    for name, needed, otherwise, _ in _NEEDED_OF_FOLDERS:
        if theirs.get(name) not in (None, needed):
            raise ValueError(
                f"{name} is {shown(theirs[name])} ({otherwise}), which training does not have."
            )
    config = _from_mixtral(theirs) if format == "mixtral" else _from_dynamic_moe(theirs)
    check_config(config)
    return config


def _from_both(theirs: dict[str, Any], rms_norm_eps: float) -> dict[str, Any]:
    """What Mixtral and the published layout have under the same names."""
    heads = _required(theirs, "num_attention_heads")
    ffn = _required(theirs, "intermediate_size")
    return NO_ROUTING | {
        "vocab_size": _required(theirs, "vocab_size"),
        "hidden_size": _required(theirs, "hidden_size"),
        "num_hidden_layers": _required(theirs, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": _required(theirs, "hidden_size") // heads,
        "hidden_act": theirs.get("hidden_act", "silu"),
        "max_position_embeddings": _required(theirs, "max_position_embeddings"),
        "initializer_range": theirs.get("initializer_range", 0.02),
        "rms_norm_eps": theirs.get("rms_norm_eps", rms_norm_eps),
        "attention_bias": False,
        "qk_norm": False,
        "attention_dropout": theirs.get("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        "tie_word_embeddings": theirs.get("tie_word_embeddings", False),
        "intermediate_size": ffn,
        "moe_intermediate_size": ffn,
        "shared_expert_intermediate_size": None,
        "shared_expert_gate": False,
        "router_dtype": "float32",
        **DEFAULT_IDS,
        "output_router_logits": False,
        "use_cache": True,
        **{name: theirs[name] for name in CARRIED if name in theirs},
    }


def _from_mixtral(theirs: dict[str, Any]) -> dict[str, Any]:
    config = _from_both(theirs, rms_norm_eps=1e-5)
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    for name, needed, value in (
        ("rope_type", "default", rope.get("rope_type", rope.get("type", "default"))),
        ("partial_rotary_factor", 1.0, rope.get("partial_rotary_factor", 1.0)),
    ):
        if value != needed:
            raise ValueError(f"{name} is {shown(value)}, which training does not have.")
    base = rope.get("rope_theta") or theirs.get("rope_theta") or 1e6  # Mixtral's own default
    return config | {
        "num_key_value_heads": theirs.get("num_key_value_heads") or config["num_key_value_heads"],
        "head_dim": theirs.get("head_dim") or config["head_dim"],
        "rope_parameters": rope_of(float(base), 1.0),
        "num_experts": theirs.get("num_local_experts", theirs.get("num_experts", 8)),
        "num_experts_per_tok": theirs.get("num_experts_per_tok", 2),
        "mlp_layer_types": ["sparse"] * config["num_hidden_layers"],
        "router_dtype": dtype_name(theirs) or "float32",
        **_loss_from_a_mixtral(theirs, config["num_hidden_layers"]),
    }


def _loss_from_a_mixtral(theirs: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Its balance loss in our words: a mean over layers, of which ours is the sum; scale k both."""
    coefficient = theirs.get("router_aux_loss_coef", 0.001)  # Mixtral's own default
    if not coefficient:
        return {}
    return {"balance_loss": "aux_loss", "balance_loss_coeff": coefficient / num_layers}


def _loss_of_a_mixtral(config: dict[str, Any]) -> float:
    if config["balance_loss"] == "none":
        return 0.0
    coefficient = (config["balance_loss_coeff"] or 0.0) * config["num_hidden_layers"]
    return float(f"{coefficient:.15g}")  # as it was before it was divided


def _from_dynamic_moe(theirs: dict[str, Any]) -> dict[str, Any]:
    config = _from_both(theirs, rms_norm_eps=1e-6)
    threshold = _required(theirs, "top_p_threshold")
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"top_p_threshold is {threshold!r}: it is a cumulative probability, so use 0 to 1."
        )
    config |= {
        "num_experts": _required(theirs, "num_experts"),
        "rope_parameters": rope_of(10000.0, 1.0),  # that code never reads the config's
        "mlp_layer_types": kinds_of_layers(
            layers_with_experts(
                theirs.get("expert_frequency", 1), config["num_hidden_layers"], "expert_frequency"
            )
        ),
    }
    routed = with_routing(config, DynMoEConfig(routing="top_p", threshold=float(threshold)))
    return routed | {"measured_experts_per_token": theirs.get("measured_experts_per_token")}


def dtype_name(theirs: dict[str, Any]) -> str | None:
    """The type that a ``config.json`` states for its weights."""
    found = theirs.get("dtype", theirs.get("torch_dtype"))
    if found is not None and not isinstance(found, str):
        raise ValueError(f"dtype is {found!r}: use a name, such as bfloat16.")
    return found and found.removeprefix("torch.")


def _check_expressible(config: dict[str, Any], format: str) -> None:
    known = config | {
        "rope_theta": rope_theta(config),
        "partial_rotary_factor": partial_rotary_factor(config),
        "rope_type": rope_type(config),
    }
    needed = NEEDED_BY_MIXTRAL if format == "mixtral" else NEEDED_BY_DYNAMIC_MOE
    for name, value, otherwise, _ in needed:
        if known[name] != value:
            raise ValueError(
                f"format {format} cannot express {name} {shown(known[name])} ({otherwise}): it "
                f"has {shown(value)} only. Use --format dynmoe."
            )
    sparse = [kind == "sparse" for kind in config["mlp_layer_types"]]
    if format == "mixtral":
        if not all(sparse):
            raise ValueError(
                "format mixtral cannot express mlp_layer_types with layers without experts. Use "
                "--format dynmoe."
            )
        return
    problems = {
        "threshold": len({v for v in per_layer(config, "threshold") if v is not None}) != 1,
        "num_key_value_heads": config["num_key_value_heads"] != config["num_attention_heads"],
        "head_dim": config["head_dim"] * config["num_attention_heads"] != config["hidden_size"],
        "mlp_layer_types": not isinstance(layer_frequency(sparse), int),
        "intermediate_size": not all(sparse)
        and config["intermediate_size"] != config["moe_intermediate_size"],
    }
    for name, cannot in problems.items():
        if cannot:
            raise ValueError(
                f"format dynamic-moe cannot express {name} {shown(config[name])}: its code has "
                "one threshold for all layers, as many key-value heads as heads, heads that "
                "divide the hidden size, experts in every n-th layer and one intermediate size. "
                "Use --format dynmoe."
            )


def _required(theirs: dict[str, Any], name: str) -> Any:
    if theirs.get(name) is None:
        raise ValueError(f"there is no {name}")
    return theirs[name]
