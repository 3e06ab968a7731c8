"""Transformers' own Mixtral, for models of stock top-k."""

from __future__ import annotations

from typing import Any

from megatron_dynmoe.conversion.formats.common import (
    USUAL_NORMS,
    USUAL_ROWS,
    USUAL_WORDS,
    dtype_name,
    has_experts_everywhere,
    usual_config,
    usual_words,
)
from megatron_dynmoe.conversion.formats.format import Format, Limit
from megatron_dynmoe.conversion.model_settings import Needed, rope_of, shown
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
_WORDS = USUAL_WORDS | {
    *("num_key_value_heads", "head_dim", "num_local_experts", "num_experts"),
    *("num_experts_per_tok", "router_aux_loss_coef"),
    *("rope_parameters", "rope_scaling", "rope_theta"),
}


def _write(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return usual_words(config, dtype) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "head_dim": config["head_dim"],
        "attention_dropout": config["attention_dropout"],
        "num_local_experts": config["num_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "router_aux_loss_coef": _aux_loss_coef(config),
        "sliding_window": None,
    }


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    config = usual_config(theirs, rms_norm_eps=1e-5)
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
        **_balance_loss(theirs, config["num_hidden_layers"]),
    }


def _balance_loss(theirs: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Mixtral's balance loss under our names: a mean over layers, ours a sum; both scale with k."""
    coefficient = theirs.get("router_aux_loss_coef", 0.001)  # Mixtral's own default
    if not coefficient:
        return {}
    return {"balance_loss": "aux_loss", "balance_loss_coeff": coefficient / num_layers}


def _aux_loss_coef(config: dict[str, Any]) -> float:
    if config["balance_loss"] == "none":
        return 0.0
    coefficient = (config["balance_loss_coeff"] or 0.0) * config["num_hidden_layers"]
    return float(f"{coefficient:.15g}")  # as it was before it was divided


FORMAT = Format(
    name="mixtral",
    summary="native Mixtral, for stock top-k",
    rows=ROWS,
    recognizes=lambda theirs: theirs.get("model_type") == "mixtral",
    write=_write,
    read=_read,
    words=lambda: _WORDS,
    needed=(
        Needed("routing", "top_k", "a varying number of experts per token"),
        Needed("weights", "renormalized", "raw weights (--moe-router-pre-softmax)"),
        Needed("attention_bias", False, "biases in attention"),
        Needed("qk_norm", False, "norms of queries and keys"),
        Needed("shared_expert_intermediate_size", None, "shared experts"),
        Needed("partial_rotary_factor", 1.0, "rotary positions in a part of a head"),
        Needed("rope_type", "default", "scaled rotary positions"),
    ),
    limits=(Limit("mlp_layer_types", has_experts_everywhere, "experts in every layer"),),
    counts=("num_local_experts",),
    numbers=("router_aux_loss_coef",),
    how_to_load="""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")  # a native Mixtral
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
""",
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
