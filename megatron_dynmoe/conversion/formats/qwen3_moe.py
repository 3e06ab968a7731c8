"""Transformers' own Qwen3-MoE, for models of stock top-k with norms of queries and keys."""

from __future__ import annotations

from typing import Any

from megatron_dynmoe.conversion.formats.common import (
    DENSE_ROWS,
    GROUPED_WORDS,
    HEAD_NORMS,
    MLP,
    NO_BIASES,
    NO_SHARED_EXPERTS,
    TOP_K,
    UNSCALED_POSITIONS,
    USUAL_NORMS,
    USUAL_ROWS,
    USUAL_WORDS,
    WHOLE_HEADS_TURN,
    aux_loss_coef,
    balance_loss,
    dtype_name,
    grouped_config,
    has_experts,
    how_to_load,
    num_sparse,
    required,
    usual_config,
    usual_words,
)
from megatron_dynmoe.conversion.formats.format import Format, Limit
from megatron_dynmoe.conversion.model_settings import TOKEN_IDS, Needed, kinds_of_layers
from megatron_dynmoe.conversion.names import row
from megatron_dynmoe.settings.messages.command_line import UsageError

ROWS = (
    *USUAL_ROWS,
    *USUAL_NORMS,
    *HEAD_NORMS,
    *DENSE_ROWS,
    row(MLP + "gate.weight", "router"),
    row(MLP + "experts.{expert}.gate_proj.weight", "expert_gate"),
    row(MLP + "experts.{expert}.up_proj.weight", "expert_up"),
    row(MLP + "experts.{expert}.down_proj.weight", "expert_down"),
)
# What Qwen3 models, dense or with experts, say. Without the first word of these two the usual
# sliding_window means nothing.
QWEN3_WORDS = (
    USUAL_WORDS - {"sliding_window"} | GROUPED_WORDS | {"use_sliding_window", "layer_types"}
)
_EXPERTS = ("num_experts", "num_local_experts")  # the same, the second one in Transformers 5
_WORDS = (
    QWEN3_WORDS
    | {*_EXPERTS, "num_experts_per_tok", "moe_intermediate_size"}
    | {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef"}
)


def qwen3_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """The part of the config that dense Qwen3 models have, too.

    Raises:
        UsageError: a token does not see all before it, or the positions are scaled.
    """
    if theirs.get("use_sliding_window"):
        raise UsageError(
            "use_sliding_window is True (sliding-window attention), which training does not have: "
            "if no text is longer than the window, set it to false in config.json."
        )
    kinds = theirs.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UsageError(
            f"layer_types is {kinds}, and training has 'full_attention' only: if no text is longer "
            "than the window, leave layer_types out of config.json."
        )
    theirs = theirs | {"sliding_window": None}
    required(theirs, "num_key_value_heads")
    return usual_config(theirs, rms_norm_eps=1e-6) | {
        **grouped_config(theirs, default_base=1e4),
        "qk_norm": True,
        **{name: theirs.get(name) for name in TOKEN_IDS},
    }


def _write(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    dense = [i for i, kind in enumerate(config["mlp_layer_types"]) if kind == "dense"]
    return usual_words(config, dtype) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": config["head_dim"],
        "attention_bias": False,
        "attention_dropout": config["attention_dropout"],
        "intermediate_size": config["intermediate_size"] or config["moe_intermediate_size"],
        "moe_intermediate_size": config["moe_intermediate_size"],
        "num_experts": config["num_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "norm_topk_prob": config["weights"] == "renormalized",
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "router_aux_loss_coef": aux_loss_coef(config),
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    config = qwen3_config(theirs)
    step, layers = theirs.get("decoder_sparse_step") or 1, config["num_hidden_layers"]
    dense = theirs.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"mlp_only_layers is {dense!r}: use a list of layers, counted from 0.")
    experts = {theirs[name] for name in _EXPERTS if theirs.get(name) is not None}
    if len(experts) != 1:
        raise ValueError(f"{' and '.join(_EXPERTS)} give {[*experts]}: give one of them.")
    config |= {
        "num_experts": experts.pop(),
        "num_experts_per_tok": theirs.get("num_experts_per_tok") or 8,  # Qwen3-MoE's own default
        "moe_intermediate_size": required(theirs, "moe_intermediate_size"),
        "weights": "renormalized" if theirs.get("norm_topk_prob", False) else "raw",
        "mlp_layer_types": kinds_of_layers(
            [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
        ),
        "router_dtype": dtype_name(theirs) or "float32",
    }
    return config | balance_loss(theirs, num_sparse(config))


FORMAT = Format(
    name="qwen3-moe",
    summary="native Qwen3-MoE, for stock top-k",
    rows=ROWS,
    recognizes=lambda theirs: theirs.get("model_type") == "qwen3_moe",
    write=_write,
    read=_read,
    words=lambda: _WORDS,
    needed=(
        TOP_K,
        NO_BIASES,
        Needed("qk_norm", True, "no norms of queries and keys"),
        NO_SHARED_EXPERTS,
        WHOLE_HEADS_TURN,
        UNSCALED_POSITIONS,
    ),
    limits=(Limit("num_experts", has_experts, "experts in at least one layer"),),
    counts=("num_local_experts", "decoder_sparse_step", "sliding_window"),
    numbers=("router_aux_loss_coef",),
    flags=("norm_topk_prob", "use_sliding_window"),
    how_to_load=how_to_load("Qwen3-MoE"),
    column={
        "what it is": "`Qwen3MoeForCausalLM`",
        "runs in": "Transformers and any engine that knows Qwen3-MoE",
        "routing": "top-k",
        "theta (DRN), threshold per layer, caps": "no",
        "weights raw / renormalized": "both",
        "routing computed in": "float32 after a gate in the type of the weights",
        "grouped-query attention, head size": "yes",
        "rotary base / part of a head": "any / all",
        "biases of q, k, v; norms of q and k": "norms, always",
        "shared experts": "no",
        "layers without experts": "any, but one with experts",
        "tied embeddings": "yes",
    },
)
