"""The layout that the authors of Dynamic MoE published, for top-p with one threshold."""

from __future__ import annotations

from typing import Any

from megatron_dynmoe.conversion.formats.common import (
    ATTENTION,
    MLP,
    NO_BIASES,
    NO_HEAD_NORMS,
    NO_SHARED_EXPERTS,
    UNSCALED_POSITIONS,
    USUAL_ROWS,
    USUAL_WORDS,
    WHOLE_HEADS_TURN,
    has_experts_everywhere,
    required,
    usual_config,
    usual_words,
)
from megatron_dynmoe.conversion.formats.format import Format, Limit
from megatron_dynmoe.conversion.model_settings import (
    Needed,
    kinds_of_layers,
    layer_frequency,
    per_layer,
    rope_of,
)
from megatron_dynmoe.conversion.names import row
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.upstream_flags import layers_with_experts

ROWS = (
    *USUAL_ROWS,
    row("model.layers.{layer}.input_norm.weight", "attention_norm"),
    row("model.layers.{layer}.post_attention_norm.weight", "mlp_norm"),
    row(MLP + "mlp.gate_proj.weight", "gate"),
    row(MLP + "mlp.up_proj.weight", "up"),
    row(MLP + "mlp.down_proj.weight", "down"),
    row(MLP + "router.weight", "router"),
    row(MLP + "experts.{expert}.gate_proj.weight", "expert_gate"),
    row(MLP + "experts.{expert}.up_proj.weight", "expert_up"),
    row(MLP + "experts.{expert}.down_proj.weight", "expert_down"),
)
# The code of that layout has as many key-value heads as heads, and rotary positions of its own.
_WORDS = USUAL_WORDS | {
    *("num_experts", "expert_frequency", "top_p_threshold", "measured_experts_per_token"),
}


def _write(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return usual_words(config, dtype) | {
        "architectures": ["MoEForCausalLM"],
        "model_type": "llama",
        "num_experts": config["num_experts"],
        "experts_topk": 2,  # there in the published file, and unused
        "expert_frequency": layer_frequency(_sparse(config)),
        "top_p_threshold": next(iter(_thresholds(config))),
        "rope_scaling": None,
        # Not in the published file; its code keeps what it does not know.
        "measured_experts_per_token": config["measured_experts_per_token"],
    }


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    from megatron_dynmoe.conversion.routing_settings import with_routing  # it imports torch

    config = usual_config(theirs, rms_norm_eps=1e-6)
    threshold = required(theirs, "top_p_threshold")
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"top_p_threshold is {threshold!r}: it is a cumulative probability, so use 0 to 1."
        )
    frequency, num_layers = theirs.get("expert_frequency", 1), config["num_hidden_layers"]
    config |= {
        "num_experts": required(theirs, "num_experts"),
        "rope_parameters": rope_of(10000.0, 1.0),  # that code never reads the config's
        "mlp_layer_types": kinds_of_layers(
            layers_with_experts(frequency, num_layers, "expert_frequency")
        ),
    }
    routed = with_routing(config, DynMoEConfig(routing="top_p", threshold=float(threshold)))
    return routed | {"measured_experts_per_token": theirs.get("measured_experts_per_token")}


def _sparse(config: dict[str, Any]) -> list[bool]:
    return [kind == "sparse" for kind in config["mlp_layer_types"]]


def _thresholds(config: dict[str, Any]) -> set[float]:
    return {value for value in per_layer(config, "threshold") if value is not None}


FORMAT = Format(
    name="dynamic-moe",
    summary="the published layout of Dynamic MoE",
    rows=ROWS,
    recognizes=lambda theirs: (
        theirs.get("architectures") == ["MoEForCausalLM"] or "top_p_threshold" in theirs
    ),
    write=_write,
    read=_read,
    words=lambda: _WORDS,
    # Settings for which the layout has no word; its own code assumes these values.
    needed=(
        Needed("routing", "top_p", "another routing than top-p with a fixed threshold"),
        Needed("normalization", "none", "routing normalization with a theta"),
        Needed("weights", "raw", "renormalized weights"),
        Needed("max_experts_per_token", None, "a cap"),
        Needed("inference_max_experts_per_token", None, "a cap at inference"),
        Needed("inference_threshold", None, "another threshold at inference"),
        Needed("inference_experts_per_token", None, "a budget"),
        Needed("rope_theta", 10000.0, "another rotary base"),
        WHOLE_HEADS_TURN,
        UNSCALED_POSITIONS,
        NO_BIASES,
        NO_HEAD_NORMS,
        NO_SHARED_EXPERTS,
        Needed("tie_word_embeddings", False, "tied embeddings"),
    ),
    limits=(
        Limit("threshold", lambda c: len(_thresholds(c)) == 1, "one threshold for all layers"),
        Limit(
            "num_key_value_heads",
            lambda c: c["num_key_value_heads"] == c["num_attention_heads"],
            "as many key-value heads as heads",
        ),
        Limit(
            "head_dim",
            lambda c: c["head_dim"] * c["num_attention_heads"] == c["hidden_size"],
            "heads that divide the hidden size",
        ),
        Limit(
            "mlp_layer_types",
            lambda c: isinstance(layer_frequency(_sparse(c)), int),
            "experts in every n-th layer",
        ),
        Limit(
            "intermediate_size",
            lambda c: (
                has_experts_everywhere(c) or c["intermediate_size"] == c["moe_intermediate_size"]
            ),
            "one intermediate size for dense layers and experts",
        ),
    ),
    counts=("expert_frequency",),
    numbers=("top_p_threshold",),
    has_model_code=False,
    inv_freq_key=ATTENTION + "rotary_emb.inv_freq",
    how_to_load="""\
This is the layout that the authors of Dynamic MoE published, for their own modeling file and
Transformers 4.33. Their code computes the routing in the type of the weights; training did so in
float32. In a 16-bit type some tokens therefore choose another number of experts.
""",
    column={
        "what it is": "what the authors of Dynamic MoE published",
        "runs in": "the authors' code (Transformers 4.33)",
        "routing": "top-p, one threshold",
        "theta (DRN), threshold per layer, caps": "no",
        "weights raw / renormalized": "raw",
        "routing computed in": "the type of the weights",
        "grouped-query attention, head size": "no",
        "rotary base / part of a head": "10000 / all",
        "biases of q, k, v; norms of q and k": "no",
        "shared experts": "no",
        "layers without experts": "all but every n-th, all of the same size",
        "tied embeddings": "no",
    },
)
