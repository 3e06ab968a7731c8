"""Transformers' own Llama, for models without experts."""

from __future__ import annotations

from typing import Any

from megatron_dynmoe.conversion.formats.common import (
    DENSE_ROWS,
    GROUPED_WORDS,
    NO_BIASES,
    NO_HEAD_NORMS,
    UNSCALED_POSITIONS,
    USUAL_NORMS,
    USUAL_ROWS,
    USUAL_WORDS,
    WHOLE_HEADS_TURN,
    dense_config,
    grouped_config,
    how_to_load,
    usual_config,
    usual_words,
)
from megatron_dynmoe.conversion.formats.format import Format
from megatron_dynmoe.conversion.model_settings import Needed

# What the layouts of dense models cannot express.
DENSE_ONLY = (
    Needed("num_experts", 0, "experts"),
    NO_BIASES,
    WHOLE_HEADS_TURN,
    UNSCALED_POSITIONS,
)


def dense_words(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The content of ``config.json`` that dense models of Transformers have in common."""
    words = usual_words(config, dtype) | {
        "head_dim": config["head_dim"],
        "intermediate_size": config["intermediate_size"],
        "attention_bias": False,
        "attention_dropout": config["attention_dropout"],
    }
    del words["output_router_logits"]
    return words


def _write(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return dense_words(config, dtype) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "mlp_bias": False,
    }


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    config = usual_config(theirs, rms_norm_eps=1e-6) | grouped_config(theirs, default_base=1e4)
    return dense_config(config)


FORMAT = Format(
    name="llama",
    summary="native Llama, for models without experts",
    rows=(*USUAL_ROWS, *USUAL_NORMS, *DENSE_ROWS),
    # Dynamic MoE's published layout calls itself a Llama, too.
    recognizes=lambda theirs: (
        theirs.get("model_type") == "llama"
        and theirs.get("architectures") in (None, ["LlamaForCausalLM"])
        and "top_p_threshold" not in theirs
    ),
    write=_write,
    read=_read,
    words=lambda: USUAL_WORDS | GROUPED_WORDS,
    needed=(*DENSE_ONLY, NO_HEAD_NORMS),
    how_to_load=how_to_load("Llama"),
    column={
        "what it is": "`LlamaForCausalLM`",
        "runs in": "Transformers and any engine that knows Llama",
        "routing": "none",
        "theta (DRN), threshold per layer, caps": "no",
        "weights raw / renormalized": "none",
        "routing computed in": "not at all",
        "grouped-query attention, head size": "yes",
        "rotary base / part of a head": "any / all",
        "biases of q, k, v; norms of q and k": "no",
        "shared experts": "no",
        "layers without experts": "all",
        "tied embeddings": "yes",
    },
)
