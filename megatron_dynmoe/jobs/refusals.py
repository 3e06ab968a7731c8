"""Refuses a plan whose training would be refused at its start, in the training's own words."""

from __future__ import annotations

import contextlib
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from unittest import mock

from packaging.version import Version

from megatron_dynmoe.jobs.parse import parse
from megatron_dynmoe.planning.gpus import GPU

_NEW_ENOUGH = Version("9999")  # for whatever Megatron asks of it
# Files and services of the machine that trains.
_ELSEWHERE = {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "wandb_project": ""}


def check_start(words: Sequence[str], num_gpus: int, gpu: GPU) -> None:
    """Refuse what a training on such GPUs refuses before it builds a model.

    Left to the start are packages and files that this machine may lack and the other have.

    Args:
        words: the whole command line.

    Raises:
        ValueError: the training's message.
    """
    args = parse(words)
    # These import Megatron's training, for seconds; the parser has done it already.
    from megatron.training.arguments import validate_args

    from megatron_dynmoe.model.hybrid import model_config_from_args
    from megatron_dynmoe.model.settled import settle_run
    from megatron_dynmoe.settings.arguments import naming_flags
    from megatron_dynmoe.training.checks.settle_arguments import settle_arguments
    from megatron_dynmoe.training.loop import refusing_in_flags

    args.rank, args.world_size = 0, num_gpus
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    _fill_in(args)
    with _as_on_gpu(gpu), refusing_in_flags(words):
        resolved, chosen = settle_arguments(args, here=False)
        with _with_packages_of(chosen.backend):
            validate_args(args, {})
            model = model_config_from_args(args)
        with naming_flags(args):
            settle_run(resolved, model.transformer, chosen, args, here=False)


def _fill_in(args: Namespace) -> None:
    """Give what no plan asks for, and take what need not be on this machine."""
    vars(args).update(_ELSEWHERE)
    if args.lr is None:
        args.lr = 1.0
    if args.train_iters is None and args.train_samples is None:
        args.train_iters = 1


@contextlib.contextmanager
def _as_on_gpu(gpu: GPU) -> Iterator[None]:
    """Let ``torch.cuda`` answer as on one of these GPUs, and Megatron print nothing."""
    import torch

    from megatron_dynmoe.backends.no_driver import answers

    device = answers(
        name=gpu.label, capability=gpu.capability, memory_bytes=int(gpu.memory), processors=1
    )
    with (
        mock.patch.multiple(torch.cuda, **device, current_device=lambda: 0),
        mock.patch.dict(os.environ, CUDA_DEVICE_MAX_CONNECTIONS="1"),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _with_packages_of(backend: str) -> Iterator[None]:
    """Let Megatron find a Transformer Engine that only the planned machine has."""
    from megatron_dynmoe.backends.choice import has_transformer_engine

    if backend != "transformer_engine" or has_transformer_engine():
        yield
        return
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(utils, "_te_version", _NEW_ENOUGH))
        for module in (moe_utils, rope_utils):
            for name in dir(module):
                if name.startswith("fused_") and getattr(module, name) is None:
                    stack.enter_context(mock.patch.object(module, name, object()))
        yield
