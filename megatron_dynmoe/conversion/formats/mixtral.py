"""Transformers' own Mixtral, for models of stock top-k."""

from __future__ import annotations

from typing import Any

from megatron_dynmoe.conversion.formats.common import (
    GROUPED_WORDS,
    NO_BIASES,
    NO_HEAD_NORMS,
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
    has_experts_everywhere,
    how_to_load,
    usual_config,
    usual_words,
)
from megatron_dynmoe.conversion.formats.format import Format, Limit
from megatron_dynmoe.conversion.model_settings import Needed
from megatron_dynmoe.conversion.names import row

_SPARSE_BLOCK = "model.layers.{layer}.block_sparse_moe."
ROWS = (
    *USUAL_ROWS,
    *USUAL_NORMS,
    row(_SPARSE_BLOCK + "gate.weight", "router"),
    row(_SPARSE_BLOCK + "experts.{expert}.w1.weight", "expert_gate"),
    row(_SPARSE_BLOCK + "experts.{expert}.w2.weight", "expert_down"),
    row(_SPARSE_BLOCK + "experts.{expert}.w3.weight", "expert_up"),
)
_WORDS = (
    USUAL_WORDS
    | GROUPED_WORDS
    | {"num_local_experts", "num_experts", "num_experts_per_tok", "router_aux_loss_coef"}
)


def _write(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return usual_words(config, dtype) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "head_dim": config["head_dim"],
        "attention_dropout": config["attention_dropout"],
        "num_local_experts": config["num_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "router_aux_loss_coef": aux_loss_coef(config),
        "sliding_window": None,
    }


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    config = usual_config(theirs, rms_norm_eps=1e-5)
    return config | {
        **grouped_config(theirs, default_base=1e6),
        "num_experts": theirs.get("num_local_experts", theirs.get("num_experts", 8)),
        "num_experts_per_tok": theirs.get("num_experts_per_tok", 2),
        "mlp_layer_types": ["sparse"] * config["num_hidden_layers"],
        "router_dtype": dtype_name(theirs) or "float32",
        **balance_loss(theirs, config["num_hidden_layers"]),
    }


FORMAT = Format(
    name="mixtral",
    summary="native Mixtral, for stock top-k",
    rows=ROWS,
    recognizes=lambda theirs: theirs.get("model_type") == "mixtral",
    write=_write,
    read=_read,
    words=lambda: _WORDS,
    needed=(
        TOP_K,
        Needed("weights", "renormalized", "raw weights (--moe-router-pre-softmax)"),
        NO_BIASES,
        NO_HEAD_NORMS,
        NO_SHARED_EXPERTS,
        WHOLE_HEADS_TURN,
        UNSCALED_POSITIONS,
    ),
    limits=(Limit("mlp_layer_types", has_experts_everywhere, "experts in every layer"),),
    counts=("num_local_experts",),
    numbers=("router_aux_loss_coef",),
    how_to_load=how_to_load("Mixtral"),
    column={
        "what it is": "`MixtralForCausalLM`",
        "runs in": "Transformers and any engine that knows Mixtral",
        "routing": "top-k, renormalized",
        "theta (DRN), threshold per layer, caps": "no",
        "weights raw / renormalized": "renormalized",
        "routing computed in": "float32 after a gate in the type of the weights",
        "grouped-query attention, head size": "yes",
        "rotary base / part of a head": "any / all",
        "biases of q, k, v; norms of q and k": "no",
        "shared experts": "no",
        "layers without experts": "no",
        "tied embeddings": "yes",
    },
)
