"""Finds a model's settings among Megatron's arguments, and makes the flags of a training."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_dynmoe.conversion.hugging_face.words import carried_in
from megatron_dynmoe.conversion.model_settings import (
    NO_ROUTING,
    TOKEN_IDS,
    Needed,
    kinds_of_layers,
    layer_frequency,
    partial_rotary_factor,
    rope_of,
    rope_theta,
    rope_type,
    shown,
)
from megatron_dynmoe.conversion.routing_settings import (
    RouterState,
    routing_config,
    settings_from_config,
)
from megatron_dynmoe.settings.hybrid_pattern import as_whole_layers, pairs
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.routings import ROUTINGS, STOCK
from megatron_dynmoe.settings.upstream_flags import layers_with_experts

# Config's name, name among Megatron's arguments, flag.
_SAME = (
    ("num_hidden_layers", "num_layers", "--num-layers"),
    ("hidden_size", "hidden_size", "--hidden-size"),
    ("num_attention_heads", "num_attention_heads", "--num-attention-heads"),
    ("head_dim", "kv_channels", "--kv-channels"),
    ("intermediate_size", "ffn_hidden_size", "--ffn-hidden-size"),
    ("max_position_embeddings", "max_position_embeddings", "--max-position-embeddings"),
    ("rms_norm_eps", "layernorm_epsilon", "--norm-epsilon"),
    ("initializer_range", "init_method_std", "--init-method-std"),
    ("attention_dropout", "attention_dropout", "--attention-dropout"),
    ("hidden_dropout", "hidden_dropout", "--hidden-dropout"),
    ("attention_bias", "add_qkv_bias", "--add-qkv-bias"),
    ("qk_norm", "qk_layernorm", "--qk-layernorm"),
    (
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "--moe-shared-expert-intermediate-size",
    ),
    ("shared_expert_gate", "moe_shared_expert_gate", "--moe-shared-expert-gate"),
)

# Megatron's arguments that change what a model computes in a way that no format can express.
NEEDED_OF_MEGATRON = (
    Needed(
        *("position_embedding_type", "rope", "positions of another kind than rotary"),
        "give --position-embedding-type rope",
    ),
    Needed(
        *("normalization", "RMSNorm", "another norm than RMSNorm"),
        "give --normalization RMSNorm",
    ),
    Needed("swiglu", True, "another activation than SwiGLU", "give --swiglu"),
    Needed(
        *("add_bias_linear", False, "biases in the linear layers"), "give --disable-bias-linear"
    ),
    Needed("rotary_interleaved", False, "interleaved rotary positions"),
    Needed("use_rope_scaling", False, "scaled rotary positions"),
    Needed("rope_type", (None, "rope"), "rotary positions of another type"),
    Needed("rotary_seq_len_interpolation_factor", None, "interpolated rotary positions"),
    Needed("no_rope_freq", None, "layers without rotary positions"),
    Needed("multi_latent_attention", False, "multi-latent attention"),
    Needed("attention_output_gate", False, "gated attention"),
    Needed("softmax_type", "vanilla", "another softmax in attention"),
    Needed("window_size", None, "sliding-window attention"),
    Needed("qk_l2_norm", False, "L2 normalization of queries and keys"),
    Needed("experimental_attention_variant", None, "another attention"),
    Needed("linear_attention_freq", None, "linear attention"),
    Needed(
        *("layernorm_zero_centered_gamma", False, "norms whose weight is an offset to 1"),
        "leave out --apply-layernorm-1p",
    ),
    Needed("apply_residual_connection_post_layernorm", False, "post-norm residuals"),
    Needed("activation_func_clamp_value", None, "clamped activations"),
    Needed("glu_linear_offset", 0.0, "an offset in the gated unit"),
    Needed("mtp_num_layers", None, "multi-token prediction"),
    Needed(
        *("hybrid_layer_pattern", None, "layers that are not attention and an MLP in turn"),
        "give --hybrid-layer-pattern one such as *E*E",
    ),
    Needed("heterogeneous_layers_config_path", None, "layers of different kinds"),
    Needed("use_mup", False, "maximal update parametrization"),
    Needed("moe_latent_size", None, "experts in a latent space"),
    Needed("moe_apply_probs_on_input", False, "weights applied to the experts' input"),
    Needed("moe_expert_capacity_factor", None, "tokens dropped over capacity"),
    Needed("moe_router_score_function", "softmax", "another score than softmax"),
    Needed("moe_router_group_topk", None, "group-limited routing"),
    Needed("moe_router_topk_scaling_factor", None, "scaled routing weights"),
    Needed("moe_router_enable_expert_bias", False, "a bias on the experts"),
    Needed("moe_router_force_load_balancing", False, "random routing"),
)

_DTYPES = {"fp32": "float32", "fp64": "float32", "bf16": "bfloat16", "fp16": "float16"}


def obstacles(args: Namespace) -> list[tuple[Needed, Any]]:
    """The settings of a model that no format can express, with their values.

    Args:
        args: Megatron's arguments, of a trained model or of one that is to be trained.
    """
    args = as_whole_layers(args)
    dense = not getattr(args, "num_experts", None)
    found = []
    for needed in NEEDED_OF_MEGATRON:
        value = getattr(args, needed.name, None)
        allowed = needed.value if isinstance(needed.value, tuple) else (needed.value,)
        if value not in (None, *allowed) and not (dense and needed.name.startswith("moe_")):
            found.append((needed, value))
    return found


def can_be_converted(args: Namespace) -> bool:
    """Whether some format can express a trained model with these arguments."""
    trained = getattr(args, "moe_dynamic_settings", None) or {"routing": STOCK}
    return ROUTINGS[trained["routing"]].is_exported and not obstacles(args)


def config_from_megatron(args: Namespace, vocab_size: int, state: RouterState) -> dict[str, Any]:
    """The config of a trained model.

    Args:
        args: Megatron's arguments as saved with the checkpoint.
        vocab_size: the number of rows of the embedding, including Megatron's padding.
        state: ``threshold``, ``integral``, ``measured`` and ``theta`` of every layer, None for
            layers without experts; empty with stock top-k.

    Raises:
        ValueError: the model has a setting that no format can express.
    """
    dense = not getattr(args, "num_experts", None)
    for needed, value in obstacles(args):
        allowed = needed.value[0] if isinstance(needed.value, tuple) else needed.value
        raise ValueError(
            f"{needed.name} is {shown(value)} ({needed.otherwise}), which no format has: "
            f"only models trained with {shown(allowed)} can be converted. For training anew: "
            f"{needed.remedy}."
        )
    args = as_whole_layers(args)
    sparse = (False,) * args.num_layers
    if not dense:
        sparse = layers_with_experts(args.moe_layer_freq, args.num_layers, "moe_layer_freq")
    config: dict[str, Any] = {name: getattr(args, theirs, None) for name, theirs, _ in _SAME}
    experts_ffn = getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size
    config |= {
        "attention_bias": bool(config["attention_bias"]),
        "qk_norm": bool(config["qk_norm"]),
        "shared_expert_gate": bool(config["shared_expert_gate"]),
        "vocab_size": vocab_size,
        "num_key_value_heads": _query_groups(args),
        "hidden_act": "silu",
        "rope_parameters": rope_of(float(args.rotary_base), float(args.rotary_percent)),
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "num_experts": 0 if dense else args.num_experts,
        "moe_intermediate_size": experts_ffn,
        "mlp_layer_types": kinds_of_layers(sparse),
        "router_dtype": "float32",
        **NO_ROUTING,
    }
    config |= dict.fromkeys(TOKEN_IDS) | {"output_router_logits": False, "use_cache": True}
    config |= carried_in(getattr(args, "huggingface_source", None))[0]
    settings = getattr(args, "moe_dynamic_settings", None)
    if settings is None:
        if not dense:
            config["num_experts_per_tok"] = args.moe_router_topk
            config |= _top_k_loss(args)
            config["weights"] = "raw" if args.moe_router_pre_softmax else "renormalized"
            config["router_dtype"] = _DTYPES.get(args.moe_router_dtype) or model_dtype(args)
        return config
    return config | routing_config(settings, state)


def args_from_config(
    config: dict[str, Any], dtype: str, has_pattern: bool = False
) -> dict[str, Any]:
    """Megatron's arguments that describe a model, as plain values.

    Args:
        dtype: dtype of the weights: float32, bfloat16 or float16.
        has_pattern: whether it is to be a ``HybridModel``.

    Raises:
        UsageError: the model has a setting that training does not have.
        ValueError: a number is one that no flag can carry.
    """
    if config["hidden_act"] != "silu":
        raise UsageError(
            f"hidden_act is {config['hidden_act']!r}: training has 'silu' (SwiGLU) only; use "
            "another model."
        )
    if rope_type(config) != "default":
        raise UsageError(
            f"rope_type is {rope_type(config)!r} (scaled rotary positions): training has 'default' "
            "only; take the scaling out of config.json to train without it."
        )
    sparse = [kind == "sparse" for kind in config["mlp_layer_types"]]
    if (
        any(sparse)
        and (config["routing"], config["weights"]) == ("top_k", "renormalized")
        and config["num_experts_per_tok"] == 1
    ):
        raise UsageError(
            "num_experts_per_tok is 1, and the weights of a token's experts sum to 1: the only "
            "weight is always 1, through which a text cannot train the router, so training refuses "
            "it (with --moe-router-pre-softmax it would be another model). Give --routing top_p "
            "--threshold 0 --weights renormalized, which computes the same, and train the router "
            "with a higher threshold."
        )
    args = {theirs: config[name] for name, theirs, _ in _SAME}
    args |= {
        "seq_length": config["max_position_embeddings"],
        "num_query_groups": config["num_key_value_heads"],
        "group_query_attention": config["num_key_value_heads"] != config["num_attention_heads"],
        "padded_vocab_size": config["vocab_size"],
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "rotary_base": _rotary_base(config),
        "rotary_percent": partial_rotary_factor(config),
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "num_experts": config["num_experts"] if any(sparse) else None,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_layer_freq": layer_frequency(sparse) if any(sparse) else 1,
        "moe_router_topk": config["num_experts_per_tok"] or 2,
        **_upstream_loss(config),
        "moe_router_pre_softmax": config["routing"] == "top_k" and config["weights"] == "raw",
        "moe_router_dtype": {"float32": "fp32"}.get(config["router_dtype"]),
        "moe_router_score_function": "softmax",
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
        "ckpt_format": "torch_dist",
    }
    settings = settings_from_config(config)
    if settings is not None:
        args["moe_dynamic_settings"] = settings
    if has_pattern:
        halves = [half for experts in sparse for half in (0, int(experts))]
        args |= {
            "hybrid_layer_pattern": pairs(sparse),
            "num_layers": len(halves),
            "moe_layer_freq": halves if any(sparse) else 1,
        }
    return args


def training_flags(config: dict[str, Any], dtype: str, has_pattern: bool = False) -> list[str]:
    """The flags of a training command for this model, without data, optimizer and layout."""
    args = args_from_config(config, dtype, has_pattern)
    flags = ["--normalization RMSNorm", "--swiglu", "--disable-bias-linear"]
    flags.append("--position-embedding-type rope")
    for _, theirs, flag in _SAME:
        value = args[theirs]
        if value is True:
            flags.append(flag)
        elif value is not None and value is not False:
            flags.append(f"{flag} {value}")
    flags.append(f"--seq-length {args['seq_length']}")
    flags.append(f"--padded-vocab-size {args['padded_vocab_size']}")
    flags.append(f"--rotary-base {args['rotary_base']}")
    if args["rotary_percent"] != 1:
        flags.append(f"--rotary-percent {args['rotary_percent']}")
    if args["group_query_attention"]:
        flags.append(f"--group-query-attention --num-query-groups {args['num_query_groups']}")
    if args["untie_embeddings_and_output_weights"]:
        flags.append("--untie-embeddings-and-output-weights")
    flags += [f"--{name}" for name in ("bf16", "fp16") if args[name]]
    if has_pattern:
        flags.append(f"--hybrid-layer-pattern {args['hybrid_layer_pattern']}")
    if args["num_experts"] is None:
        return flags
    flags.append(f"--num-experts {config['num_experts']}")
    flags.append(f"--moe-ffn-hidden-size {config['moe_intermediate_size']}")
    frequency = args["moe_layer_freq"]
    if frequency != 1 and not has_pattern:
        # No quotes: a shell takes those that come out of $(cat ...) for a part of the value.
        flags.append(f"--moe-layer-freq {str(frequency).replace(' ', '')}")
    settings = args.get("moe_dynamic_settings")
    if settings is None:
        flags.append(f"--moe-router-topk {args['moe_router_topk']}")
        if "moe_aux_loss_coeff" in args:
            flags.append(f"--moe-router-load-balancing-type {config['balance_loss']}")
            flags.append(f"--moe-aux-loss-coeff {args['moe_aux_loss_coeff']}")
        if args["moe_router_pre_softmax"]:
            flags.append("--moe-router-pre-softmax")
        if args["moe_router_dtype"]:
            flags.append(f"--moe-router-dtype {args['moe_router_dtype']}")
        return flags
    for name, value in settings.items():
        flags.append(f"--moe-dynamic-{name.replace('_', '-')} {value}")
    return flags


def model_dtype(args: Namespace) -> str:
    """The type of a trained model's weights."""
    if getattr(args, "bf16", False):
        return "bfloat16"
    return "float16" if getattr(args, "fp16", False) else "float32"


def _rotary_base(config: dict[str, Any]) -> int:
    """The base for Megatron's flag, which takes whole numbers only."""
    base = rope_theta(config)
    if base != int(base) or not 1 <= base < 2**63:
        raise ValueError(
            f"rope_theta is {base}: training has whole numbers from 1 only (--rotary-base)."
        )
    return int(base)


def _query_groups(args: Namespace) -> int:
    grouped = getattr(args, "group_query_attention", False)
    return args.num_query_groups if grouped else args.num_attention_heads


def _top_k_loss(args: Namespace) -> dict[str, Any]:
    """The balance loss of stock top-k under our names: Megatron divides it by k, we do not."""
    kinds = getattr(args, "moe_router_load_balancing_type", None)
    coefficients = getattr(args, "moe_aux_loss_coeff", None)
    kind = kinds[0] if isinstance(kinds, list) and len(kinds) == 1 else kinds
    if isinstance(coefficients, list) and len(coefficients) == 1:
        coefficients = coefficients[0]
    if kind not in ("aux_loss", "seq_aux_loss", "global_aux_loss") or not coefficients:
        return {}
    coefficient = coefficients / args.moe_router_topk
    short = float(f"{coefficient:.15g}")  # as it was before it was multiplied by k
    if short * args.moe_router_topk == coefficients:
        coefficient = short
    return {"balance_loss": kind, "balance_loss_coeff": coefficient}


def _upstream_loss(config: dict[str, Any]) -> dict[str, Any]:
    coefficient = config["balance_loss_coeff"]
    if config["routing"] != "top_k" or config["balance_loss"] == "none" or not coefficient:
        return {}
    return {
        "moe_router_load_balancing_type": config["balance_loss"],
        "moe_aux_loss_coeff": coefficient * config["num_experts_per_tok"],
    }
