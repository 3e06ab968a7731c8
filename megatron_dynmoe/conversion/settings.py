"""A model's settings in Megatron's words, in each format's words, and from one to the other.

In the middle stand the fields of our own format's configuration (:class:`DynMoEModelConfig`),
which can express everything that is converted: here called *config*, a plain dict.
"""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.control.settle import settle

# Config's name, name among Megatron's arguments, flag.
_SAME_IN_MEGATRON = (
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


class Needed(NamedTuple):
    """The only value of a setting that can be converted, and what any other would mean."""

    name: str
    value: Any
    otherwise: str


# Megatron's arguments that change the function of a model in a way that no format here has.
_NEEDED_OF_MEGATRON = (
    Needed("position_embedding_type", "rope", "positions of another kind than rotary"),
    Needed("normalization", "RMSNorm", "another norm than RMSNorm"),
    Needed("swiglu", True, "another activation than SwiGLU"),
    Needed("add_bias_linear", False, "biases in the linear layers"),
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
    Needed("layernorm_zero_centered_gamma", False, "norms whose weight is an offset to 1"),
    Needed("apply_residual_connection_post_layernorm", False, "post-norm residuals"),
    Needed("activation_func_clamp_value", None, "clamped activations"),
    Needed("glu_linear_offset", 0.0, "an offset in the gated unit"),
    Needed("mtp_num_layers", None, "multi-token prediction"),
    Needed("hybrid_layer_pattern", None, "a hybrid model"),
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

# What the published layout of Dynamic MoE has no word for; its own code assumes these values.
_NEEDED_BY_DYNAMIC_MOE = (
    Needed("routing", "top_p", "another routing than top-p with a fixed threshold"),
    Needed("normalization", "none", "routing normalization with a theta"),
    Needed("weights", "raw", "renormalized weights"),
    Needed("max_experts_per_token", None, "a cap"),
    Needed("inference_max_experts_per_token", None, "a cap at inference"),
    Needed("inference_threshold", None, "another threshold at inference"),
    Needed("rope_theta", 10000.0, "another rotary base"),
    Needed("partial_rotary_factor", 1.0, "rotary positions in a part of a head"),
    Needed("attention_bias", False, "biases in attention"),
    Needed("qk_norm", False, "norms of queries and keys"),
    Needed("shared_expert_intermediate_size", None, "shared experts"),
    Needed("tie_word_embeddings", False, "tied embeddings"),
)
_NEEDED_BY_MIXTRAL = (
    Needed("routing", "top_k", "a varying number of experts per token"),
    Needed("weights", "renormalized", "raw weights (--moe-router-pre-softmax)"),
    Needed("attention_bias", False, "biases in attention"),
    Needed("qk_norm", False, "norms of queries and keys"),
    Needed("shared_expert_intermediate_size", None, "shared experts"),
    Needed("partial_rotary_factor", 1.0, "rotary positions in a part of a head"),
)
_CONTROLLER = (
    "scope",
    "proportional_gain",
    "integral_gain",
    "initial_threshold",
    "min_threshold",
    "max_threshold",
)
_ROUTING = (
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
_NO_ROUTING = dict.fromkeys(_ROUTING) | {
    "routing": "top_k",
    "normalization": "none",
    "weights": "renormalized",
    "balance_loss": "none",
    "threshold": None,
    "theta": None,
    "target_experts_per_token": None,
    "controller": None,
    "measured_experts_per_token": None,
    "num_experts_per_tok": None,
}
RouterState = dict[str, list[float | None]]


def config_from_megatron(args: Namespace, vocab_size: int, state: RouterState) -> dict[str, Any]:
    """The config of a trained model.

    Args:
        args: Megatron's arguments as saved with the checkpoint.
        vocab_size: rows of the embedding, with Megatron's padding.
        state: ``threshold``, ``integral``, ``measured`` and ``theta`` of every layer, None for
            those without experts; empty with stock top-k.

    Raises:
        ValueError: the model does something that no format has.
    """
    dense = not getattr(args, "num_experts", None)
    for needed in _NEEDED_OF_MEGATRON:
        value = getattr(args, needed.name, None)
        allowed = needed.value if isinstance(needed.value, tuple) else (needed.value,)
        if value not in (None, *allowed) and not (dense and needed.name.startswith("moe_")):
            raise ValueError(
                f"{needed.name} is {_shown(value)} ({needed.otherwise}), which no format has: "
                f"only models trained with {_shown(allowed[0])} can be converted."
            )
    config: dict[str, Any] = {
        name: getattr(args, theirs, None) for name, theirs, _ in _SAME_IN_MEGATRON
    }
    experts_ffn = getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size
    config |= {
        "attention_bias": bool(config["attention_bias"]),
        "qk_norm": bool(config["qk_norm"]),
        "shared_expert_gate": bool(config["shared_expert_gate"]),
        "vocab_size": vocab_size,
        "num_key_value_heads": _query_groups(args),
        "hidden_act": "silu",
        "rope_parameters": _rope(float(args.rotary_base), float(args.rotary_percent)),
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "num_experts": 0 if dense else args.num_experts,
        "moe_intermediate_size": experts_ffn,
        "mlp_layer_types": _layer_types(args.moe_layer_freq, args.num_layers, dense),
        "router_dtype": "float32",
        **_NO_ROUTING,
    }
    settings = getattr(args, "moe_dynamic_settings", None)
    if settings is None:
        if not dense:
            config["num_experts_per_tok"] = args.moe_router_topk
            config["weights"] = "raw" if args.moe_router_pre_softmax else "renormalized"
            config["router_dtype"] = _DTYPES.get(args.moe_router_dtype) or model_dtype(args)
        return config
    return config | routing_config(settings, state)


def routing_config(settings: dict[str, Any], state: RouterState) -> dict[str, Any]:
    """The routing part of the config, from resolved settings and the state of the routers."""
    dynmoe = DynMoEConfig.from_dict(settings, source="the checkpoint")
    routing = {name: getattr(dynmoe, name) for name in _ROUTING}
    schedule = dynmoe.target_experts_per_token
    target = None if schedule is None else str(schedule)
    controller = None
    if dynmoe.is_controlled:
        controller = {name: getattr(dynmoe, name) for name in _CONTROLLER}
        controller["integral"] = state["integral"]
    measured = state["measured"]
    return routing | {
        "threshold": state["threshold"],
        "theta": state["theta"] if dynmoe.normalization == "drn" else None,
        "target_experts_per_token": float(target) if _is_number(target) else target,
        "controller": controller,
        "measured_experts_per_token": measured if any(measured) else None,
        "num_experts_per_tok": None,
    }


def settings_from_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """Resolved settings for the trainer; None for stock top-k."""
    if config["routing"] == "top_k":
        return None
    settings = {name: config.get(name) for name in _ROUTING}
    if config["routing"] == "top_p":
        thresholds = {value for value in _per_layer(config, "threshold") if value is not None}
        if len(thresholds) != 1:
            raise ValueError(
                f"threshold is {config['threshold']}: with routing 'top_p' training has one fixed "
                "threshold for all layers; give one number, or train with --routing dtop_p "
                "--scope layer."
            )
        settings["threshold"] = thresholds.pop()
    else:
        settings["target_experts_per_token"] = config["target_experts_per_token"]
        settings |= {name: (config.get("controller") or {}).get(name) for name in _CONTROLLER}
    given = {name: value for name, value in settings.items() if value is not None}
    return settled(DynMoEConfig.from_dict(given, source="config.json"), config).to_dict()


def settled(dynmoe: DynMoEConfig, config: dict[str, Any]) -> DynMoEConfig:
    """Resolved settings for a model of this config, with every ``auto`` computed."""
    model = SimpleNamespace(
        num_moe_experts=config["num_experts"],
        hidden_size=config["hidden_size"],
        init_method_std=config["initializer_range"],
    )
    return settle(dynmoe, model)[0]


def router_state(config: dict[str, Any]) -> RouterState:
    """Threshold, integral and measured mean of every layer, None for those without experts."""
    integral = (config.get("controller") or {}).get("integral")
    return {
        "threshold": _per_layer(config, "threshold"),
        "integral": integral or _where_sparse(config, 0.0),
        "measured": config.get("measured_experts_per_token") or _where_sparse(config, 0.0),
    }


def with_routing(config: dict[str, Any], dynmoe: DynMoEConfig) -> dict[str, Any]:
    """The config with another routing, its state as at the start of training."""
    if not dynmoe.is_dynamic:
        kept = {
            "num_experts_per_tok": config.get("num_experts_per_tok"),
            "weights": config["weights"],
        }
        if kept["num_experts_per_tok"] is None:
            raise ValueError(
                f"routing is 'top_k', but the model was trained with {config['routing']!r}, which "
                "knows no k: choose top_p or dtop_p."
            )
        return config | _NO_ROUTING | kept
    dynmoe = settled(dynmoe, config)
    first = dynmoe.threshold if dynmoe.threshold is not None else dynmoe.initial_threshold
    state: RouterState = {
        "threshold": _where_sparse(config, shortest(first)),
        "integral": _where_sparse(config, 0.0),
        "measured": _where_sparse(config, 0.0),
        "theta": _where_sparse(config, 1.0),
    }
    return config | routing_config(dynmoe.to_dict(), state) | {"router_dtype": "float32"}


def args_from_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Megatron's arguments that describe a model, as plain values.

    Args:
        dtype: of the weights: float32, bfloat16 or float16.

    Raises:
        ValueError: the model does something that training does not.
    """
    if config["hidden_act"] != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r}: training has 'silu' (SwiGLU).")
    sparse = [kind == "sparse" for kind in config["mlp_layer_types"]]
    args = {theirs: config[name] for name, theirs, _ in _SAME_IN_MEGATRON}
    args |= {
        "seq_length": config["max_position_embeddings"],
        "num_query_groups": config["num_key_value_heads"],
        "group_query_attention": config["num_key_value_heads"] != config["num_attention_heads"],
        "padded_vocab_size": config["vocab_size"],
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "rotary_base": rope_theta(config),
        "rotary_percent": partial_rotary_factor(config),
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "num_experts": config["num_experts"] or None,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_layer_freq": _frequency(sparse),
        "moe_router_topk": config["num_experts_per_tok"] or 2,
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
    return args


def training_flags(config: dict[str, Any], dtype: str) -> list[str]:
    """The flags of a training command for this model, all but data, optimizer and layout."""
    args = args_from_config(config, dtype)
    flags = ["--normalization RMSNorm", "--swiglu", "--disable-bias-linear"]
    flags.append("--position-embedding-type rope")
    for name, _, flag in _SAME_IN_MEGATRON:
        value = config[name]
        if value is True:
            flags.append(flag)
        elif value not in (None, False):
            flags.append(f"{flag} {value}")
    flags.append(f"--seq-length {args['seq_length']}")
    flags.append(f"--rotary-base {args['rotary_base']:g}")
    if args["rotary_percent"] != 1:
        flags.append(f"--rotary-percent {args['rotary_percent']:g}")
    if args["group_query_attention"]:
        flags.append(f"--group-query-attention --num-query-groups {args['num_query_groups']}")
    if args["untie_embeddings_and_output_weights"]:
        flags.append("--untie-embeddings-and-output-weights")
    flags += [f"--{name}" for name in ("bf16", "fp16") if args[name]]
    if not config["num_experts"]:
        return flags
    flags.append(f"--num-experts {config['num_experts']}")
    flags.append(f"--moe-ffn-hidden-size {config['moe_intermediate_size']}")
    frequency = args["moe_layer_freq"]
    if frequency != 1:
        shown = str(frequency).replace(" ", "")
        flags.append(f"--moe-layer-freq '{shown}'" if "[" in shown else f"--moe-layer-freq {shown}")
    settings = args.get("moe_dynamic_settings")
    if settings is None:
        flags.append(f"--moe-router-topk {args['moe_router_topk']}")
        if args["moe_router_pre_softmax"]:
            flags.append("--moe-router-pre-softmax")
        if args["moe_router_dtype"]:
            flags.append(f"--moe-router-dtype {args['moe_router_dtype']}")
        return flags
    for name, value in settings.items():
        flags.append(f"--moe-dynamic-{name.replace('_', '-')} {value}")
    return flags


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
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if format == "mixtral":
        return shared | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "head_dim": config["head_dim"],
            "attention_dropout": config["attention_dropout"],
            "num_local_experts": config["num_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
            "sliding_window": None,
        }
    sparse = [kind == "sparse" for kind in config["mlp_layer_types"]]
    threshold = next(value for value in _per_layer(config, "threshold") if value is not None)
    return shared | {
        "architectures": ["MoEForCausalLM"],
        "model_type": "llama",
        "num_experts": config["num_experts"],
        "experts_topk": 2,  # there in the published file, and unused
        "expert_frequency": _frequency(sparse),
        "top_p_threshold": threshold,
        "rope_scaling": None,
    }


def format_of(theirs: dict[str, Any]) -> str:
    """Which of the formats a ``config.json`` is of.

    Raises:
        ValueError: none of them.
    """
    kind = theirs.get("model_type")
    if kind in ("dynmoe", "mixtral"):
        return kind
    if "MoEForCausalLM" in (theirs.get("architectures") or []) or "top_p_threshold" in theirs:
        return "dynamic-moe"
    raise ValueError(
        f"config.json has model_type {kind!r} and architectures {theirs.get('architectures')}: "
        "only dynmoe, mixtral and the published Dynamic MoE layout (architectures "
        "['MoEForCausalLM']) can be read."
    )


def from_format(theirs: dict[str, Any], format: str) -> dict[str, Any]:
    """The config, from what ``config.json`` of a format holds.

    Raises:
        ValueError: a setting is missing, or training has nothing like it.
    """
    if format == "dynmoe":
        from megatron_dynmoe.huggingface.configuration_dynmoe import DynMoEModelConfig

        checked = DynMoEModelConfig.from_dict(theirs).to_dict()
        return checked
    heads = _required(theirs, "num_attention_heads")
    ffn = _required(theirs, "intermediate_size")
    num_layers = _required(theirs, "num_hidden_layers")
    config = _NO_ROUTING | {
        "vocab_size": _required(theirs, "vocab_size"),
        "hidden_size": _required(theirs, "hidden_size"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": _required(theirs, "hidden_size") // heads,
        "hidden_act": theirs.get("hidden_act", "silu"),
        "max_position_embeddings": _required(theirs, "max_position_embeddings"),
        "initializer_range": theirs.get("initializer_range", 0.02),
        "rms_norm_eps": theirs.get("rms_norm_eps", 1e-5 if format == "mixtral" else 1e-6),
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
    }
    if format == "mixtral":
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        for needed, value in (
            (Needed("sliding_window", None, ""), theirs.get("sliding_window")),
            (Needed("rope_type", "default", ""), kind),
        ):
            if value != needed.value:
                raise ValueError(
                    f"config.json: {needed.name} is {_shown(value)}, which training does not have."
                )
        base = rope.get("rope_theta") or theirs.get("rope_theta") or 1e6  # Mixtral's own default
        return config | {
            "num_key_value_heads": theirs.get("num_key_value_heads") or heads,
            "head_dim": theirs.get("head_dim") or config["head_dim"],
            "rope_parameters": _rope(float(base), 1.0),
            "num_experts": theirs.get("num_local_experts", theirs.get("num_experts", 8)),
            "num_experts_per_tok": theirs.get("num_experts_per_tok", 2),
            "mlp_layer_types": ["sparse"] * num_layers,
            "router_dtype": dtype_name(theirs) or "float32",
        }
    threshold = _required(theirs, "top_p_threshold")
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ValueError(
            f"config.json: top_p_threshold is {threshold!r}: it is a cumulative probability, so "
            "use 0 to 1."
        )
    frequency = theirs.get("expert_frequency", 1)
    layer_types = _layer_types(frequency, num_layers, dense=False)
    dynmoe = DynMoEConfig(routing="top_p", threshold=float(threshold))
    config |= {
        "num_experts": _required(theirs, "num_experts"),
        "rope_parameters": _rope(10000.0, 1.0),  # that code never reads the config's
        "mlp_layer_types": layer_types,
    }
    return with_routing(config, dynmoe)


def model_dtype(args: Namespace) -> str:
    """The type of a trained model's weights."""
    if getattr(args, "bf16", False):
        return "bfloat16"
    return "float16" if getattr(args, "fp16", False) else "float32"


def dtype_name(theirs: dict[str, Any]) -> str | None:
    """The type that a ``config.json`` states for its weights."""
    found = theirs.get("dtype") or theirs.get("torch_dtype")
    return found.removeprefix("torch.") if isinstance(found, str) else None


def shortest(value: float) -> float:
    """The shortest decimal number that is this value in float32: 0.4, not 0.4000000059604645."""
    return float(str(np.float32(value)))


def rope_theta(config: dict[str, Any]) -> float:
    """The base of the rotary positions."""
    return config["rope_parameters"]["rope_theta"]


def partial_rotary_factor(config: dict[str, Any]) -> float:
    """The part of a head that is rotated."""
    return config["rope_parameters"].get("partial_rotary_factor", 1.0)


_DTYPES = {"fp32": "float32", "fp64": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _check_expressible(config: dict[str, Any], format: str) -> None:
    known = config | {
        "rope_theta": rope_theta(config),
        "partial_rotary_factor": partial_rotary_factor(config),
    }
    needed = _NEEDED_BY_MIXTRAL if format == "mixtral" else _NEEDED_BY_DYNAMIC_MOE
    for name, value, otherwise in needed:
        if known[name] != value:
            raise ValueError(
                f"format {format} cannot express {name} {_shown(known[name])} ({otherwise}): it "
                f"has {_shown(value)} only. Use --format dynmoe."
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
        "threshold": len({v for v in _per_layer(config, "threshold") if v is not None}) != 1,
        "num_key_value_heads": config["num_key_value_heads"] != config["num_attention_heads"],
        "head_dim": config["head_dim"] * config["num_attention_heads"] != config["hidden_size"],
        "mlp_layer_types": not isinstance(_frequency(sparse), int),
        "intermediate_size": not all(sparse)
        and config["intermediate_size"] != config["moe_intermediate_size"],
    }
    for name, cannot in problems.items():
        if cannot:
            raise ValueError(
                f"format dynamic-moe cannot express {name} {_shown(config[name])}: its code has "
                "one threshold for all layers, as many key-value heads as heads, heads that "
                "divide the hidden size, experts in every n-th layer and one intermediate size. "
                "Use --format dynmoe."
            )


def _query_groups(args: Namespace) -> int:
    grouped = getattr(args, "group_query_attention", False)
    return args.num_query_groups if grouped else args.num_attention_heads


def _rope(theta: float, partial: float) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    return rope if partial == 1 else rope | {"partial_rotary_factor": partial}


def _layer_types(frequency: int | list[int], num_layers: int, dense: bool) -> list[str]:
    if dense:
        return ["dense"] * num_layers
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in range(num_layers)]
    return ["sparse" if sparse else "dense" for sparse in frequency]


def _frequency(sparse: list[bool]) -> int | list[int]:
    """N where every N-th layer has experts, from the first on; else the pattern."""
    for every in range(1, len(sparse) + 1):
        if sparse == [layer % every == 0 for layer in range(len(sparse))]:
            return every
    return [int(kind) for kind in sparse]


def _per_layer(config: dict[str, Any], name: str) -> list[float | None]:
    value = config[name]
    return value if isinstance(value, list) else _where_sparse(config, value)


def _where_sparse(config: dict[str, Any], value: float) -> list[float | None]:
    return [value if kind == "sparse" else None for kind in config["mlp_layer_types"]]


def _required(theirs: dict[str, Any], name: str) -> Any:
    if theirs.get(name) is None:
        raise ValueError(f"config.json has no {name}")
    return theirs[name]


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and float(text) > 0
    except ValueError:
        return False


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
