"""Names of a run's checkpoints, and files that are replaced whole; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Megatron's note of the last complete checkpoint: an iteration, or "release".
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def checkpoint_name(name: int | str) -> str:
    """The folder of an iteration's checkpoint, or of ``release``."""
    return RELEASE if name == RELEASE else f"iter_{name:07d}"


def partial_name(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.partial")


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, bring it to the disk, and put it there at once.

    Whatever ends this process: there is the old file or the new one, never a part of it. When this
    returns it is the new one, also after a power cut.
    """
    partial = partial_name(path)
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every network's file system can
            os.fsync(folder)
    finally:
        os.close(folder)
