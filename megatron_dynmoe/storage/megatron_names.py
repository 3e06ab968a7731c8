"""Names in a folder of Megatron's checkpoints, and that of the folder in the folder of a run."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

# Megatron's note of the last complete checkpoint: an iteration, or "release".
TRACKER = "latest_checkpointed_iteration.txt"

RELEASE = "release"

CHECKPOINTS = "checkpoints"  # in --run-dir


def checkpoint_name(name: int | str) -> str:
    """The folder of an iteration's checkpoint, or of ``release``."""
    return RELEASE if name == RELEASE else f"iter_{name:07d}"


def read_tracker(tracker: Path) -> int | str:
    """The iteration that Megatron's note names, or ``release``.

    Raises:
        ValueError: it holds something else.
    """
    text = tracker.read_text(errors="replace").strip()
    if text == RELEASE:
        return RELEASE
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{tracker} holds {text[:40]!r}, not an iteration")
    return int(text)


def nearby_checkpoints(path: Path) -> Path | None:
    """The folder of a run's checkpoints that a path was probably meant to name; None without one.

    Above it, if the path names a single checkpoint; below it, if it names a run; beside it, if a
    part of it is misspelled.
    """
    candidates = [path.parent, path / CHECKPOINTS]
    there = next((parent for parent in path.absolute().parents if parent.is_dir()), None)
    if there is not None and not path.exists():
        misspelled, *rest = path.absolute().relative_to(there).parts
        names = [folder.name for folder in there.iterdir() if folder.is_dir()]
        for name in difflib.get_close_matches(misspelled, names):
            meant = there.joinpath(name, *rest)
            if not path.is_absolute() and meant.is_relative_to(Path.cwd()):
                meant = meant.relative_to(Path.cwd())
            candidates += [meant, meant / CHECKPOINTS]
    return next((folder for folder in candidates if (folder / TRACKER).is_file()), None)
