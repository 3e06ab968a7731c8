"""Parses a recipe and flags as Megatron does, without starting it."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megatron_dynmoe.settings.hybrid_pattern import adapt_pattern


def parse(flags: Sequence[str]) -> Namespace:
    """Parse flags by the parser of the training. The first call imports Megatron, for seconds.

    Raises:
        ValueError: a flag is unknown, or a value has the wrong type.
    """
    return _parser().parse_args(list(flags))


@functools.cache
def _parser() -> ArgumentParser:
    # PyTorch would warn that a login node has no GPU, upstream of packages that it would like.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_dynmoe.training.flags import training_parser
    return training_parser()


def read_args(flags: Sequence[str]) -> Namespace:
    """Parse flags with Megatron's own parser and fill in the sizes that it derives.

    Args:
        flags: a whole command line of ``megatron_dynmoe.pretrain``.

    Raises:
        ValueError: a flag is unknown or missing, or has a bad value.
    """
    args = parse(flags)
    adapt_pattern(args)
    # This repeats upstream's validate_args, which cannot run without processes.
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        if not getattr(args, name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is missing: the model's size depends on it.")
    if args.ffn_hidden_size is None:
        factor = 4 * 2 / 3 if args.swiglu else 4
        args.ffn_hidden_size = int(factor * args.hidden_size)
        if args.swiglu:
            args.ffn_hidden_size = args.ffn_hidden_size // 64 * 64
    if args.kv_channels is None:
        if args.hidden_size % args.num_attention_heads:
            raise ValueError(
                f"--hidden-size is {args.hidden_size}, which --num-attention-heads "
                f"{args.num_attention_heads} does not divide: change one, or give --kv-channels."
            )
        args.kv_channels = args.hidden_size // args.num_attention_heads
    if args.moe_ffn_hidden_size is None and args.num_experts:
        args.moe_ffn_hidden_size = args.ffn_hidden_size
    if args.recompute_activations:
        args.recompute_granularity = "selective"
    if args.bf16 and not args.grad_reduce_in_bf16:
        args.accumulate_allreduce_grads_in_fp32 = True
    if args.padded_vocab_size is None:
        if args.vocab_size is None:
            raise ValueError(
                "--vocab-size is missing: give the size of the tokenizer's vocabulary, as 32000."
            )
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        args.padded_vocab_size = math.ceil(args.vocab_size / multiple) * multiple
    return args
