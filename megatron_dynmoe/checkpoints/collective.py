"""What saving and loading checkpoints share: their flags, and ranks that fail together.

Every save ends with ``manifest.json``, the size and SHA-256 of all files (:mod:`.save`). Every load
compares the files with it before it reads anything (:mod:`.load`).
:mod:`megatron_dynmoe.upstream.patches` wraps Megatron's own functions in both.
"""

from __future__ import annotations

import errno
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class CheckpointError(ValueError):
    """A checkpoint cannot be saved or loaded; the message says what to do."""


def add_flags(parser: ArgumentParser) -> ArgumentParser:
    """Add ``--ckpt-fallback`` and ``--no-ckpt-manifest``."""
    parser.add_argument(
        "--ckpt-fallback",
        action="store_true",
        help="If the checkpoint that --load leads to is damaged or missing, go on from the "
        "newest good one before it, and say so. If none is good, the run stops.",
    )
    parser.add_argument(
        "--no-ckpt-manifest",
        action="store_false",
        dest="ckpt_manifest",
        help="Do not write manifest.json, the size and SHA-256 of every file, into checkpoints.",
    )
    return parser


def on_all_ranks[T](action: Callable[[], T], explain: Callable[[str], str] = str) -> list[T]:
    """Run an action on every rank; a failure on one is raised on all, so that none waits for it.

    Args:
        action: what this rank does.
        explain: makes the message out of the text of the failure.

    Returns:
        The results of all ranks, in their order.

    Raises:
        CheckpointError: the action failed on some rank.
    """
    try:
        mine: tuple[Any, str | None] = action(), None
    except Exception as error:
        is_plain = isinstance(error, CheckpointError) or not dist.is_initialized()
        mine = None, cause(error) if is_plain else f"rank {rank()}: {cause(error)}"
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    errors = [error for _, error in everyone if error is not None]
    if errors:
        more = f" ({len(errors)} ranks say so)" if len(errors) > 1 else ""
        raise CheckpointError(explain(errors[0] + more))
    return [result for result, _ in everyone]


def on_rank_0[T](action: Callable[[], T], explain: Callable[[str], str] = str) -> T:
    """Run an action on rank 0 and return its result on all ranks; see :func:`on_all_ranks`."""
    result: Any = on_all_ranks(lambda: action() if rank() == 0 else None, explain)[0]
    return result


def rank() -> int:
    """The rank of this process; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def cause(error: BaseException) -> str:
    """An error in words, with the file if the system names one."""
    if isinstance(error, OSError) and error.strerror:
        words = error.strerror.lower()
        if error.errno == errno.ENOSPC:
            words = "no space is left on the device"
        return f"{words}: {error.filename}" if error.filename else words
    text = str(error) or type(error).__name__
    if "inline_container" in text and "unexpected pos" in text:
        # PyTorch's writer says this of a file that it could only write a part of.
        return f"no space is left on the device, or a quota is used up ({text})"
    return text


def is_local(path: Any) -> bool:
    """Whether a path leads to a file system, and not to an object store."""
    return "://" not in str(path)
