"""Refuses flags that Megatron cannot combine, and names both values before Megatron asserts it.

:mod:`megatron_dynmoe.planning.layout` checks sizes and the number of processes, as it also does
before a job.
"""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser, Namespace

from megatron_dynmoe.data.tokenizer import SENTENCEPIECE_TYPES, build_tokenizer
from megatron_dynmoe.planning.layout import Layout, check_layout
from megatron_dynmoe.settings.messages.command_line import LARGEST, number
from megatron_dynmoe.settings.messages.refusals import FlagError

# These numbers have to be at least 1. Upstream checks few of them: it divides by them, or trains
# with them. All other numbers have to be at least 0, except those that mean something below 0.
_FROM_1 = (
    *("ffn_hidden_size", "moe_ffn_hidden_size", "kv_channels", "num_query_groups", "rotary_base"),
    *("vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by", "moe_router_topk"),
    *("global_batch_size", "eval_global_batch_size", "eval_micro_batch_size"),
    *("recompute_num_layers", "lr_decay_iters", "lr_decay_samples"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    "distributed_timeout_minutes",
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("num_dataset_builder_threads", "dist_ckpt_workers", "num_distributed_optimizer_instances"),
)
_BELOW_0 = (
    *("local_rank", "async_ckpt_cpu_priority", "async_ckpt_io_priority", "null_tokenizer_eod_id"),
    *("glu_linear_offset", "moe_router_force_biased", "fp8_margin", "logging_level"),
)
_TO_1 = (
    *("hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2", "lion_beta1"),
    *("lion_beta2", "rotary_percent", "lr_warmup_fraction", "sgd_momentum", "muon_momentum"),
)
_BETAS = ("adam_beta1", "adam_beta2", "lion_beta1", "lion_beta2")
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size")


def bound_numbers(parser: ArgumentParser) -> None:
    """Let one of Megatron's parsers refuse NaN, infinities and numbers that make no sense."""
    for action in parser._actions:
        is_signed = isinstance(action.default, int | float) and action.default < 0
        if action.type not in (int, float) or is_signed or action.dest in _BELOW_0:
            continue
        high = 1 if action.dest in _TO_1 else LARGEST
        action.type = number(action.type, int(action.dest in _FROM_1), high)


def check_arguments(args: Namespace) -> None:
    """Refuse what Megatron would stop at in an assertion, or accept without a word.

    Args:
        args: Megatron's arguments, parsed and not yet validated.

    Raises:
        FlagError: the message names the flag that was typed, its value and the remedy.
    """
    _check_given(args)
    # If the sizes of the model come from elsewhere, upstream checks them.
    if not args.use_checkpoint_args:
        _check_sizes(args)
        check_layout(Layout.from_args(args))
    _check_schedule(args)
    if isinstance(args.moe_layer_freq, int) and args.moe_layer_freq < 1:
        raise FlagError(
            "moe_layer_freq",
            args.moe_layer_freq,
            "",
            "every how many layers has experts? Give a whole number from 1, or leave out "
            "--num-experts for a dense model",
        )
    for name in _BETAS:
        if (beta := getattr(args, name)) >= 1:
            raise FlagError(name, beta, "", "use a number from 0 and below 1")
    if args.bf16 and args.fp16:
        raise FlagError("bf16", True, " and --fp16, too", "give one of them")
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise FlagError(
            "wandb_project",
            args.wandb_project,
            ", and the package wandb is not installed",
            "pip install wandb, or leave the flag out",
        )


def _check_given(args: Namespace) -> None:
    """Refuse a command line without the flags that every run needs.

    Upstream notices late that they are missing, or does not name the flag.
    """
    if args.tokenizer_type is None and not args.use_checkpoint_args:
        raise FlagError(
            "tokenizer_type",
            None,
            "",
            "give that of --tokenizer-model, SentencePieceTokenizer for a .model file or "
            "HuggingFaceTokenizer for a folder",
        )
    if args.tokenizer_type in SENTENCEPIECE_TYPES and not args.use_checkpoint_args:
        if args.tokenizer_model is None:
            remedy = f"--tokenizer-type {args.tokenizer_type} needs a .model file"
            raise FlagError("tokenizer_model", None, "", remedy)
        build_tokenizer(args.tokenizer_type, args.tokenizer_model)  # says what it is if it is none
    if args.skip_train:
        return
    if args.train_iters is None and args.train_samples is None:
        raise FlagError("train_iters", None, "", "give the number of steps")
    if args.lr is None and not args.use_checkpoint_opt_param_scheduler:
        raise FlagError("lr", None, "", "give the highest learning rate, such as 3e-4")


def _check_sizes(args: Namespace) -> None:
    for name in _NEEDED:
        value = getattr(args, name)
        if value is None or value < 1:
            raise FlagError(name, value, "", "give a whole number from 1")
    positions = args.max_position_embeddings
    if positions is None or positions < args.seq_length:
        raise FlagError(
            "max_position_embeddings",
            positions,
            f", and --seq-length is {args.seq_length}",
            f"give {args.seq_length} positions or more",
        )
    width, tensor = args.ffn_hidden_size, args.tensor_model_parallel_size
    if args.swiglu and args.bias_swiglu_fusion and width and (width // tensor) % 2:
        raise FlagError(
            "ffn_hidden_size",
            width,
            f", which Megatron's fused --swiglu cannot halve on each of {tensor} tensor-parallel "
            "ranks",
            f"use a multiple of {2 * tensor}, or add --no-bias-swiglu-fusion",
        )
    heads = args.num_attention_heads
    if args.kv_channels is None and args.hidden_size % heads:
        raise FlagError(
            "hidden_size",
            args.hidden_size,
            f", which --num-attention-heads {heads} does not divide",
            "change one, or give the size of a head with --kv-channels",
        )
    _check_rotary(args)


def _check_rotary(args: Namespace) -> None:
    """Refuse a head size that rotary embeddings cannot cut into pairs.

    Upstream would fail in the first step.
    """
    if args.multi_latent_attention or args.position_embedding_type not in ("rope", "yarn"):
        return
    head = args.kv_channels or args.hidden_size // args.num_attention_heads
    turned = int(head * args.rotary_percent)
    if turned % 2:
        name, heads = "kv_channels", ""
        if args.kv_channels is None:
            name, heads = "hidden_size", f" of {args.num_attention_heads} heads"
        raise FlagError(
            name,
            getattr(args, name),
            f"{heads} with --rotary-percent {args.rotary_percent:g}, which turns {turned} numbers "
            "of each head",
            "rotary positions turn pairs, so change one, or give --kv-channels",
        )


def check_top_k(args: Namespace) -> None:
    """Refuse more experts per token than there are. This concerns only stock top-k.

    Raises:
        FlagError: the message names both flags and their values.
    """
    k, experts = args.moe_router_topk, args.num_experts
    if experts and k > experts:
        raise FlagError(
            "moe_router_topk",
            k,
            f" (2 if it is not given), and --num-experts is {experts}",
            f"a token can use {experts} at most",
        )


def _check_schedule(args: Namespace) -> None:
    if args.rampup_batch_size is not None:
        raise FlagError(
            "rampup_batch_size",
            " ".join(map(str, args.rampup_batch_size)),
            ", which Megatron 0.19 ignores",
            "use --step-batch-size-schedule in its place, or leave it out",
        )
    for unit in ("iters", "samples"):
        warmup, train = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"train_{unit}")
        decay = getattr(args, f"lr_decay_{unit}")
        last, flag = (train, "train") if decay is None else (decay, "lr-decay")
        if warmup and last is not None and warmup >= last:
            raise FlagError(
                f"lr_warmup_{unit}",
                warmup,
                f", which is not below --{flag}-{unit} ({last})",
                "warm up for less, or train for longer",
            )
