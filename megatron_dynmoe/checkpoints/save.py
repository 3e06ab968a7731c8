"""Saving: writes a manifest into every checkpoint; a failed save ends the run with its cause.

A save writes, in this order, the files of all ranks, ``metadata.json``, ``manifest.json``, and then
Megatron's tracker (``latest_checkpointed_iteration.txt``), which names the checkpoint to load.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dynmoe.checkpoints.collective import is_local, on_all_ranks, on_rank_0, rank
from megatron_dynmoe.storage.atomic import partial_name, replace_file
from megatron_dynmoe.storage.json_files import write_json
from megatron_dynmoe.storage.manifest import MANIFEST, fingerprint
from megatron_dynmoe.storage.megatron_names import RELEASE, TRACKER, checkpoint_name

# A file that one rank writes alone has the rank's number in its name.
_OF_A_RANK = re.compile(r".*__(\d+)_\d+\.distcp")


class SaveGuard:
    """Wraps the steps of Megatron's save.

    Some steps run on one rank while the others wait for it. An error in such a step is kept until
    all ranks can learn of it.
    """

    def __init__(self) -> None:
        self._kept: list[Exception] = []

    def with_folder(self, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``save_checkpoint``: make the folder on rank 0 first, or fail on all ranks."""

        @functools.wraps(save_checkpoint)
        def save_into_folder(iteration: int, *args: Any, **kwargs: Any) -> Any:
            from megatron.training import get_args, print_rank_0

            save = get_args().save
            if not save:
                # If a step gives other results when it is run again, upstream ends the run with
                # an exit code, and saves a checkpoint even if there is no place for it.
                print_rank_0("no checkpoint is saved: --save is not given")
                return None
            if is_local(save) and not kwargs.get("non_persistent_ckpt"):
                name = RELEASE if kwargs.get("release") else iteration
                folder = Path(save) / checkpoint_name(name)
                make = functools.partial(folder.mkdir, parents=True, exist_ok=True)
                on_rank_0(make, functools.partial(_not_saved, folder))
            return save_checkpoint(iteration, *args, **kwargs)

        return save_into_folder

    def with_manifest(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``dist_checkpointing.save``, which writes everything except the tracker."""

        @functools.wraps(save)
        def save_with_manifest(state: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
            from torch.distributed.checkpoint.api import CheckpointException

            if not is_local(folder):
                return save(state, folder, *args, **kwargs)
            self._kept.clear()
            request, failure = None, None
            try:
                request = save(state, folder, *args, **kwargs)
            except CheckpointException as error:  # raised on all ranks
                failure = error
            if failure is not None:
                self._raise_kept(Path(folder))
                raise failure
            if request is None:
                self._finish(Path(folder))
            else:  # asynchronous: the function runs when all ranks have written
                request.finalize_fns.append(functools.partial(self._finish, Path(folder)))
            return request

        return save_with_manifest

    def record_returned_error(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the writing of one file, whose error Megatron replaces by its type's name."""

        @functools.wraps(write)
        def write_and_keep_error(*args: Any, **kwargs: Any) -> Any:
            outcome = write(*args, **kwargs)
            if isinstance(outcome[1], Exception):
                self._kept.append(outcome[1])
            return outcome

        return write_and_keep_error

    def record_raised_error(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a step of rank 0 that the other ranks wait for: keep its error until later."""

        @functools.wraps(step)
        def run_and_keep_error(*args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            except OSError as error:
                self._kept.append(error)

        return run_and_keep_error

    def _finish(self, folder: Path) -> None:
        from megatron.training import global_vars

        self._raise_kept(folder)
        args = global_vars._GLOBAL_ARGS  # None if a script saves without Megatron's arguments
        write_checkpoint_manifest(folder, getattr(args, "ckpt_manifest", True))

    def _raise_kept(self, folder: Path) -> None:
        def raise_first() -> None:
            if self._kept:
                raise self._kept[0]

        on_all_ranks(raise_first, functools.partial(_not_saved, folder))


def write_checkpoint_manifest(folder: Path, wanted: bool = True) -> None:
    """Write size and SHA-256 of every file of a checkpoint; all ranks take part.

    Each rank reads the files that it wrote, which its own machine still has in memory; rank 0 reads
    the rest. Files that another save left, of ranks that no longer exist, are not listed.

    Args:
        folder: the checkpoint, ``iter_...`` or ``release``.
        wanted: if False, only the manifest of an earlier save is removed.

    Raises:
        CheckpointError: on all ranks, if one cannot read or rank 0 cannot write.
    """
    explain = functools.partial(_not_saved, folder)
    files: dict[str, Any] = {}
    if wanted:
        for part in on_all_ranks(lambda: _fingerprints(folder), explain):
            files |= part
    on_rank_0(lambda: _write(folder, files), explain)


def rank_that_reads(name: str) -> int | None:
    """The rank that hashes the file of this name; None if it is no part of a checkpoint."""
    if name == MANIFEST or name.endswith((".partial", ".tmp")):
        return None
    match = _OF_A_RANK.fullmatch(name)
    return int(match[1]) if match else 0


def _fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    mine = (path for path in folder.iterdir() if rank_that_reads(path.name) == rank())
    return {path.name: fingerprint(path) for path in sorted(mine) if path.is_file()}


def _write(folder: Path, files: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if files:
        replace_file(path, lambda partial: write_json(partial, {"files": files}))
    else:
        path.unlink(missing_ok=True)
    # This reserves room for the tracker: when it is written, other ranks no longer hear of errors.
    number = folder.name.removeprefix("iter_").lstrip("0") or "0"
    partial_name(folder.parent / TRACKER).write_text(number)


def _not_saved(folder: Path, why: str) -> str:
    tracker = folder.parent / TRACKER
    latest = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    last = f"The last complete one is of iteration {latest}" if latest else "There is no other yet"
    return (
        f"the checkpoint {folder} could not be saved: {why}. {last}. Make room, mend the folder or "
        "name another one with --save, and start again with --load."
    )


class TrackerFileWriter:
    """Megatron's way to open files, except that the tracker is replaced whole or not at all.

    If the tracker were opened for writing, it would be empty for a moment, or for good if the disk
    is full.
    """

    def __init__(self, opener: Any) -> None:
        self._opener = opener

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opener, name)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Open a file; the tracker goes into a new file that replaces it."""
        if mode == "w" and os.path.basename(path) == TRACKER and is_local(path):
            return _new_tracker(Path(path))
        return self._opener.open(path, mode, *args, **kwargs)


@contextmanager
def _new_tracker(path: Path) -> Iterator[Any]:
    partial = partial_name(path)
    with partial.open("r+" if partial.exists() else "w") as file:
        yield file
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
