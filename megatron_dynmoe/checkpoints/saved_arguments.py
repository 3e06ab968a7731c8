"""Checks that a resumed run has the settings of the run that saved its checkpoint.

It compares the arguments that Megatron saves in every checkpoint, before anything is built.
Upstream finds a difference later, in an assertion (``class input value 360``) or a
``Global shape mismatch``, or not at all.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from pathlib import Path

from megatron_dynmoe.checkpoints.load import candidates
from megatron_dynmoe.conversion.megatron.checkpoint import MegatronCheckpoint
from megatron_dynmoe.settings.hybrid_pattern import PIPE
from megatron_dynmoe.settings.messages.refusals import FlagError, flag
from megatron_dynmoe.storage.megatron_names import checkpoint_name

# These are sizes of parameters. If one is not given, Megatron derives it from the others.
_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("num_query_groups", "num_experts", "moe_ffn_hidden_size"),
    "moe_shared_expert_intermediate_size",
)
# These belong to the schedules of learning rate and weight decay.
_SCHEDULE = (
    *("lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_warmup_samples"),
    *("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)
# The same for embedding and output layer, which are parameters of the others if these are missing.
_DECOUPLED = ("decoupled_lr", "decoupled_min_lr")
# The argument of Megatron's in which a hash of the tokenizer lies in its checkpoints.
_TOKENIZER = "dynmoe_tokenizer"


def agree_with_checkpoint(args: Namespace) -> None:
    """Refuse sizes and schedules that differ from the checkpoint's; keep its padded vocabulary.

    The rows that pad the vocabulary take part in the softmax. Another tensor-parallel size would
    pad with another number of rows, and so change the loss of every token.

    Args:
        args: Megatron's arguments, not yet validated; ``padded_vocab_size`` is set.

    Raises:
        FlagError: the message names the flag, both values and the remedy.
    """
    setattr(args, _TOKENIZER, _hash_of_tokenizer(args))
    saved = saved_arguments(args)
    if saved is None:
        return
    _check_pattern(args, saved)
    for name in _SIZES:
        here, there = getattr(args, name), getattr(saved, name, None)
        if name == "num_query_groups" and not args.group_query_attention:
            here = None  # here upstream's default says nothing
        if here is not None and there is not None and here != there:
            raise FlagError(
                name,
                here,
                f", and the model in {args.load} has {there}",
                f"give {flag(name)} {there}, or start anew without --load",
            )
    _keep_padded_vocabulary(args, saved)
    tell_other_tokenizer(args, saved)
    if args.finetune or args.no_load_optim or args.skip_train:
        tell_new_schedule(args, saved)
        return
    _check_groups(args, saved)
    if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        _check_schedule(args, saved)


def saved_arguments(args: Namespace) -> Namespace | None:
    """The arguments that the checkpoint to load was trained with; None if they cannot be read."""
    if not args.load or args.ckpt_format != "torch_dist" or "://" in str(args.load):
        return None
    load = Path(args.load)
    names, _ = candidates(load, args.ckpt_step, args.ckpt_fallback, False)
    try:
        return MegatronCheckpoint(load / checkpoint_name(names[0])).args if names else None
    except (ValueError, OSError):
        return None  # it is damaged or holds unreadable objects: loading will say so


def _check_pattern(args: Namespace, saved: Namespace) -> None:
    """Refuse another model class or other layers; stages of the pipeline may differ."""
    here, there = (getattr(run, "hybrid_layer_pattern", None) for run in (args, saved))
    if (here or "").replace(PIPE, "") == (there or "").replace(PIPE, ""):
        return
    raise FlagError(
        "hybrid_layer_pattern",
        here,
        f", and the model in {args.load} was trained "
        + ("without it" if there is None else f"with {there}"),
        ("leave it out" if there is None else f"give --hybrid-layer-pattern '{there}'")
        + ", or start anew without --load",
    )


def _keep_padded_vocabulary(args: Namespace, saved: Namespace) -> None:
    padded, tensor = getattr(saved, "padded_vocab_size", None), args.tensor_model_parallel_size
    if padded is None or args.padded_vocab_size is not None:
        return
    if padded % tensor:
        raise FlagError(
            "tensor_model_parallel_size",
            tensor,
            f", which does not divide the {padded} rows of the embedding in {args.load} (the "
            "vocabulary with its padding)",
            "use a size that does",
        )
    args.padded_vocab_size = padded


def tell_other_tokenizer(args: Namespace, saved: Namespace) -> None:
    """Say that the tokenizer has changed: rows were trained for pieces of the old one.

    This is a note and no refusal, because somebody may have moved the file, or added pieces to it.
    """
    here, there = (
        (run.tokenizer_type, run.tokenizer_model) if getattr(run, "tokenizer_model", None) else None
        for run in (args, saved)
    )
    if args.rank != 0 or here is None or there is None:
        return
    hashes = [getattr(run, _TOKENIZER, None) for run in (args, saved)]
    if here == there if None in hashes else hashes[0] == hashes[1]:
        return
    print(
        f"> note: the tokenizer is {here[0]} {here[1]}, and the run in {args.load} had {there[0]} "
        f"{there[1]}{' of other content' * (here == there)}: if they are not the same, the model "
        "takes each piece for another",
        flush=True,
    )


def tell_new_schedule(args: Namespace, saved: Namespace) -> None:
    """Say that the learning rate begins anew, in the middle of the run, if only the optimizer does.

    Megatron keeps the place in the schedule with the optimizer. Without it the rate warms up again,
    and it does not come down to its end, because only the rest of the run is left for all of it.
    """
    done = getattr(saved, "consumed_train_samples", None) or 0
    if args.rank != 0 or args.finetune or args.skip_train or not done:
        return
    if args.lr_decay_style == "constant" and not (
        args.lr_warmup_iters or args.lr_warmup_samples or args.lr_warmup_fraction
    ):
        return
    unit = "iters" if args.train_samples is None else "samples"
    print(
        f"> note: --no-load-optim also begins the schedule of the learning rate anew, {done} "
        f"samples into the run: to have it end with the run, give --lr-decay-{unit} what is left "
        "of it",
        flush=True,
    )


def _hash_of_tokenizer(args: Namespace) -> str | None:
    """Of the file that holds a tokenizer's pieces; None if there is none, or elsewhere."""
    path = Path(args.tokenizer_model or "")
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def _check_groups(args: Namespace, saved: Namespace) -> None:
    """Refuse a learning rate of its own for parameters that had none, and the other way round."""
    name = _DECOUPLED[0]
    here, there = (getattr(run, name, None) for run in (args, saved))
    if (here is None) != (there is None):
        as_saved = "leave it out" if there is None else f"give {flag(name)} {there}"
        raise FlagError(
            name,
            here,
            f", and the run in {args.load} has {'none' if there is None else there}: the "
            "optimizer's state is that of other groups of parameters",
            f"{as_saved}, or give --no-load-optim to begin with a new optimizer",
        )


def _check_schedule(args: Namespace, saved: Namespace) -> None:
    for name in (*_SCHEDULE, *_DECOUPLED):
        here, there = getattr(args, name), getattr(saved, name, None)
        if here is not None and there is not None and here != there:
            _refuse(args, name, here, there)
    for unit in ("iters", "samples"):
        values = []
        for run in (args, saved):
            decay = getattr(run, f"lr_decay_{unit}", None)
            values.append(getattr(run, f"train_{unit}", None) if decay is None else decay)
        if None not in values and values[0] != values[1]:
            is_given = getattr(args, f"lr_decay_{unit}") is not None
            _refuse(args, f"{'lr_decay' if is_given else 'train'}_{unit}", *values)
    here, there = args.global_batch_size, getattr(saved, "global_batch_size", None)
    if args.train_samples is None and None not in (here, there) and here != there:
        raise FlagError(
            "global_batch_size",
            here,
            f", and the run in {args.load} has {there}: Megatron counts the schedule of the "
            "learning rate in samples, so that it is another one",
            "give --override-opt-param-scheduler to go on with it, or "
            "--use-checkpoint-opt-param-scheduler to end with the samples of the old one",
        )


def _refuse(args: Namespace, name: str, here: object, there: object) -> None:
    decay = flag(name.replace("train_", "lr_decay_"))
    raise FlagError(
        name,
        here,
        f", and the run in {args.load} has {there}",
        f"give --override-opt-param-scheduler to go on with the new schedule, or {decay} {there} "
        "for the old one",
    )
