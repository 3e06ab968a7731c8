"""Names of a run's checkpoints, and files that are replaced whole; imports no torch."""

from __future__ import annotations

import difflib
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


def nearby_checkpoints(path: Path) -> Path | None:
    """The folder of a run's checkpoints that a path was probably meant to name; None without one.

    Above it, if the path names a single checkpoint; below it, if it names a run; beside it, if a
    part of it is misspelt.
    """
    candidates = [path.parent, path / "checkpoints"]
    there = next((parent for parent in path.absolute().parents if parent.is_dir()), None)
    if there is not None and not path.exists():
        misspelt, *rest = path.absolute().relative_to(there).parts
        names = [folder.name for folder in there.iterdir() if folder.is_dir()]
        for name in difflib.get_close_matches(misspelt, names):
            meant = there.joinpath(name, *rest)
            if not path.is_absolute() and meant.is_relative_to(Path.cwd()):
                meant = meant.relative_to(Path.cwd())
            candidates += [meant, meant / "checkpoints"]
    return next((folder for folder in candidates if (folder / TRACKER).is_file()), None)


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
