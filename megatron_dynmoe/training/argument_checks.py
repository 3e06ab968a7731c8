"""What Megatron's flags cannot be together: said with both numbers before Megatron asserts it.

Sizes and the number of processes are checked by :mod:`megatron_dynmoe.layout`, as before a job.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace

from megatron_dynmoe.backends.choice import has_transformer_engine
from megatron_dynmoe.layout import Layout, check_layout

_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size")


def check_arguments(args: Namespace) -> None:
    """Refuse what Megatron would stop at in an assertion, or pass over without a word.

    Args:
        args: Megatron's arguments, parsed and not yet validated.

    Raises:
        ValueError: names the flag that was typed, its value and the remedy.
    """
    _check_given(args)
    # Other sources of a model's sizes are upstream's affair.
    if not (args.use_checkpoint_args or args.hybrid_layer_pattern):
        _check_sizes(args)
        # What context parallelism needs is said first, if it is not there: by backends/choice.py.
        if args.context_parallel_size == 1 or has_transformer_engine():
            check_layout(Layout.from_args(args))
    _check_schedule(args)
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--wandb-project is {args.wandb_project}, and the package wandb is not installed: "
            "pip install wandb, or leave the flag out."
        )


def _check_given(args: Namespace) -> None:
    """What a run cannot do without, and upstream names late or not by its flag."""
    if args.tokenizer_type is None and not args.use_checkpoint_args:
        raise ValueError(
            "--tokenizer-type is not given: give that of --tokenizer-model, SentencePieceTokenizer "
            "for a .model file or HuggingFaceTokenizer for a folder."
        )
    if args.skip_train:
        return
    if args.train_iters is None and args.train_samples is None:
        raise ValueError("--train-iters is not given: give the number of steps.")
    if args.lr is None and not args.use_checkpoint_opt_param_scheduler:
        raise ValueError("--lr is not given: give the highest learning rate, such as 3e-4.")


def _check_sizes(args: Namespace) -> None:
    for name in _NEEDED:
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value is None or value < 1:
            found = "not given" if value is None else value
            raise ValueError(f"{flag} is {found}: give a whole number from 1.")
    positions = args.max_position_embeddings
    if positions is None or positions < args.seq_length:
        found = "not given" if positions is None else positions
        raise ValueError(
            f"--max-position-embeddings is {found}, and --seq-length is {args.seq_length}: give "
            f"{args.seq_length} positions or more."
        )
    heads = args.num_attention_heads
    if args.kv_channels is None and args.hidden_size % heads:
        raise ValueError(
            f"--hidden-size is {args.hidden_size}, which --num-attention-heads {heads} does not "
            "divide: change one, or give the size of a head with --kv-channels."
        )


def _check_schedule(args: Namespace) -> None:
    if args.rampup_batch_size is not None:
        raise ValueError(
            f"--rampup-batch-size is {' '.join(map(str, args.rampup_batch_size))}, which Megatron "
            "0.19 ignores: use --step-batch-size-schedule in its place, or leave it out."
        )
    for unit in ("iters", "samples"):
        warmup, train = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"train_{unit}")
        decay = getattr(args, f"lr_decay_{unit}")
        last, flag = (train, "train") if decay is None else (decay, "lr-decay")
        if warmup and last is not None and warmup >= last:
            raise ValueError(
                f"--lr-warmup-{unit} is {warmup}, which is not below --{flag}-{unit} ({last}): "
                "warm up for less, or train for longer."
            )
