"""What the layouts of Transformers share: keys of weights, and words of ``config.json``."""

from __future__ import annotations

from typing import Any

from megatron_dynmoe.conversion.hugging_face.words import CARRIED, DEFAULT_IDS
from megatron_dynmoe.conversion.model_settings import (
    NO_ROUTING,
    TOKEN_IDS,
    Needed,
    rope_theta,
    shown,
)
from megatron_dynmoe.conversion.names import row

ATTENTION = "model.layers.{layer}.self_attn."
MLP = "model.layers.{layer}.mlp."
USUAL_ROWS = (
    row("model.embed_tokens.weight", "embedding"),
    row("model.norm.weight", "final_norm"),
    row("lm_head.weight", "lm_head"),
    row(ATTENTION + "q_proj.weight", "q"),
    row(ATTENTION + "k_proj.weight", "k"),
    row(ATTENTION + "v_proj.weight", "v"),
    row(ATTENTION + "o_proj.weight", "o"),
)
USUAL_NORMS = (
    row("model.layers.{layer}.input_layernorm.weight", "attention_norm"),
    row("model.layers.{layer}.post_attention_layernorm.weight", "mlp_norm"),
)
# Settings that change what a model computes in a way that training does not have.
_NEEDED_OF_FOLDERS = (
    Needed("sliding_window", None, "sliding-window attention"),
    Needed("quantization_config", None, "quantized weights"),
    Needed("attention_bias", False, "biases in attention"),
    Needed("mlp_bias", False, "biases in the experts"),
)
# The words of a config.json that usual_config reads.
USUAL_WORDS = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "attention_dropout", "tie_word_embeddings", *CARRIED),
    *(needed.name for needed in _NEEDED_OF_FOLDERS),
}


def usual_words(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The part of ``config.json`` under the usual names."""
    return {
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


def usual_config(theirs: dict[str, Any], rms_norm_eps: float) -> dict[str, Any]:
    """The part of the config that ``config.json`` holds under the usual names.

    Args:
        rms_norm_eps: the default of the format's own code.

    Raises:
        ValueError: a setting is missing, or training does not have it.
    """
    for name, needed, otherwise, _ in _NEEDED_OF_FOLDERS:
        if theirs.get(name) not in (None, needed):
            raise ValueError(
                f"{name} is {shown(theirs[name])} ({otherwise}), which training does not have."
            )
    heads = required(theirs, "num_attention_heads")
    ffn = required(theirs, "intermediate_size")
    return NO_ROUTING | {
        "vocab_size": required(theirs, "vocab_size"),
        "hidden_size": required(theirs, "hidden_size"),
        "num_hidden_layers": required(theirs, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": required(theirs, "hidden_size") // heads,
        "hidden_act": theirs.get("hidden_act", "silu"),
        "max_position_embeddings": required(theirs, "max_position_embeddings"),
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


def required(theirs: dict[str, Any], name: str) -> Any:
    """The value of a word that ``config.json`` must have.

    Raises:
        ValueError: it is missing.
    """
    if theirs.get(name) is None:
        raise ValueError(f"there is no {name}")
    return theirs[name]


def dtype_name(theirs: dict[str, Any]) -> str | None:
    """The type that a ``config.json`` states for its weights."""
    found = theirs.get("dtype", theirs.get("torch_dtype"))
    if found is not None and not isinstance(found, str):
        raise ValueError(f"dtype is {found!r}: use a name, such as bfloat16.")
    return found and found.removeprefix("torch.")


def has_experts_everywhere(config: dict[str, Any]) -> bool:
    """Whether no layer is dense."""
    return "dense" not in config["mlp_layer_types"]
