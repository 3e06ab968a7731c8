"""What the layouts of Transformers share: keys of weights, and words of ``config.json``."""

from __future__ import annotations

from typing import Any

from megatron_dynmoe.conversion.hugging_face.words import CARRIED, DEFAULT_IDS
from megatron_dynmoe.conversion.model_settings import (
    NO_ROUTING,
    TOKEN_IDS,
    Needed,
    rope_of,
    rope_theta,
    shown,
)
from megatron_dynmoe.conversion.names import row
from megatron_dynmoe.settings.messages.command_line import UsageError

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
HEAD_NORMS = (
    row(ATTENTION + "q_norm.weight", "q_norm"),
    row(ATTENTION + "k_norm.weight", "k_norm"),
)
DENSE_ROWS = (
    row(MLP + "gate_proj.weight", "gate"),
    row(MLP + "up_proj.weight", "up"),
    row(MLP + "down_proj.weight", "down"),
)
# Settings that change what a model computes in a way that training does not have.
_NEEDED_OF_FOLDERS = (
    Needed("hidden_act", "silu", "another activation than SwiGLU", "use another model"),
    Needed(
        *("sliding_window", None, "sliding-window attention"),
        "if no text is longer than the window, set it to null in config.json",
    ),
    Needed(
        *("quantization_config", None, "quantized weights"),
        "convert the model's weights of float32, bfloat16 or float16",
    ),
    Needed("attention_bias", False, "biases in attention, the output's too", "use another model"),
    Needed("mlp_bias", False, "biases in the MLPs", "use another model"),
)
# What most layouts of others cannot express.
NO_BIASES = Needed("attention_bias", False, "biases in attention")
NO_HEAD_NORMS = Needed("qk_norm", False, "norms of queries and keys")
NO_SHARED_EXPERTS = Needed("shared_expert_intermediate_size", None, "shared experts")
WHOLE_HEADS_TURN = Needed("partial_rotary_factor", 1.0, "rotary positions in a part of a head")
UNSCALED_POSITIONS = Needed("rope_type", "default", "scaled rotary positions")
TOP_K = Needed("routing", "top_k", "a varying number of experts per token")
GROUPED_WORDS = {
    *("num_key_value_heads", "head_dim", "rope_parameters", "rope_scaling", "rope_theta"),
    "partial_rotary_factor",
}
# The words of a config.json that usual_config reads.
USUAL_WORDS = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "attention_dropout", "tie_word_embeddings", *CARRIED),
    *(needed.name for needed in _NEEDED_OF_FOLDERS),
}


def how_to_load(model: str) -> str:
    """How Transformers loads a folder of a model that it has, for the model card."""
    return f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")  # a native {model}
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


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
        UsageError: training does not have a setting.
        ValueError: a setting is missing.
    """
    for needed in _NEEDED_OF_FOLDERS:
        if theirs.get(needed.name) not in (None, needed.value):
            raise UsageError(
                f"{needed.name} is {shown(theirs[needed.name])} ({needed.otherwise}), which "
                f"training does not have: {needed.remedy}."
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


def grouped_config(theirs: dict[str, Any], default_base: float) -> dict[str, Any]:
    """Grouped queries, the size of a head and rotary positions, as Transformers' models have them.

    Args:
        default_base: the rotary base of a ``config.json`` that states none.

    Raises:
        UsageError: the rotary positions are scaled, turn a part of a head only, or are of several
            kinds.
    """
    # The older word goes first, as in Transformers.
    word = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    rope = theirs.get(word) or {}
    kinds = [name for name, value in rope.items() if isinstance(value, dict)]
    if kinds:
        raise UsageError(
            f"{word} has values for {' and '.join(kinds)} each, and only layers that are alike can "
            "be converted: if they are, give the values of one kind for all, or use another model."
        )
    turned = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor") or 1.0)
    for name, needed, value in (
        ("rope_type", "default", rope.get("rope_type", rope.get("type", "default"))),
        ("partial_rotary_factor", 1.0, turned),
    ):
        if value != needed:
            raise UsageError(
                f"{name} is {shown(value)}, and only {shown(needed)} can be converted from this "
                "format: take the change out of config.json to train without it, or use another "
                "model."
            )
    heads = required(theirs, "num_attention_heads")
    base = rope.get("rope_theta") or theirs.get("rope_theta") or default_base
    return {
        "num_key_value_heads": theirs.get("num_key_value_heads") or heads,
        "head_dim": theirs.get("head_dim") or required(theirs, "hidden_size") // heads,
        "rope_parameters": rope_of(float(base), 1.0),
    }


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a model without experts."""
    return config | {"num_experts": 0, "mlp_layer_types": ["dense"] * config["num_hidden_layers"]}


def balance_loss(theirs: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Transformers' balance loss under our names: a mean over layers, ours a sum.

    Both scale with k.

    Args:
        num_layers: the number of layers with experts.
    """
    coefficient = theirs.get("router_aux_loss_coef", 0.001)  # the default of its models
    if not coefficient or not num_layers:
        return {}
    return {"balance_loss": "aux_loss", "balance_loss_coeff": coefficient / num_layers}


def aux_loss_coef(config: dict[str, Any]) -> float:
    """The coefficient that :func:`balance_loss` reads."""
    if config["balance_loss"] == "none":
        return 0.0
    coefficient = (config["balance_loss_coeff"] or 0.0) * num_sparse(config)
    return float(f"{coefficient:.15g}")  # as it was before it was divided


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


def num_sparse(config: dict[str, Any]) -> int:
    """The number of layers with experts."""
    return config["mlp_layer_types"].count("sparse")


def has_experts(config: dict[str, Any]) -> bool:
    """Whether any layer has experts."""
    return num_sparse(config) > 0


def has_experts_everywhere(config: dict[str, Any]) -> bool:
    """Whether no layer is dense."""
    return "dense" not in config["mlp_layer_types"]
