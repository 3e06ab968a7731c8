"""Loading: compares every file with the manifest before Megatron reads any of them.

All ranks refuse a damaged checkpoint. With ``--ckpt-fallback`` they take the newest good one before
it instead. A checkpoint without a manifest is loaded, and a printed line says so.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dynmoe.checkpoints.collective import CheckpointError, cause, is_local, on_rank_0
from megatron_dynmoe.checkpoints.faults import faults
from megatron_dynmoe.checkpoints.other_backends import adopt_names
from megatron_dynmoe.checkpoints.router_entries import check_router_entries
from megatron_dynmoe.settings.messages.refusals import FlagError
from megatron_dynmoe.storage.atomic import nearest_existing, replace_file
from megatron_dynmoe.storage.manifest import MANIFEST
from megatron_dynmoe.storage.megatron_names import (
    RELEASE,
    TRACKER,
    checkpoint_name,
    nearby_checkpoints,
    read_tracker,
)

_FOLDER = re.compile(r"iter_(\d{7,18})")
_RULE = "*" * 100

Name = int | str  # the name of a checkpoint: its iteration, or "release"


def _check_can_be_written(folder: str, name: str, run_dir: str | None) -> None:
    try:
        # The folder is not made yet, so that a start that is refused leaves nothing behind.
        with tempfile.TemporaryFile(dir=nearest_existing(Path(folder))) as file:
            file.write(b"room?")
    except OSError as error:
        by_run_dir = run_dir and Path(folder).parent == Path(run_dir)
        raise FlagError(
            "run_dir" if by_run_dir else name,
            run_dir if by_run_dir else folder,
            f", where nothing can be written ({cause(error)})",
            "name a folder that can be written to, or mend this one",
        ) from None


def check_paths(args: Namespace) -> None:
    """Find out whether ``--save``, ``--tensorboard-dir`` and ``--load`` can work, at the start.

    Raises:
        ValueError: nothing can be written to a folder, or ``--load`` leads to nothing.
    """
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0  # of the ranks of this machine
    if args.tensorboard_dir and is_first:
        _check_can_be_written(args.tensorboard_dir, "tensorboard_dir", args.run_dir)
    if args.save and is_local(args.save) and is_first:
        _check_can_be_written(args.save, "save", args.run_dir)
        tracker = Path(args.save) / TRACKER
        if args.save_retain_interval and tracker.is_file():
            text = tracker.read_text(errors="replace").strip()
            if not text.isdigit() and (text == RELEASE or not args.ckpt_fallback):
                raise FlagError(
                    "save_retain_interval",
                    args.save_retain_interval,
                    f", but {tracker} holds {text[:40]!r}, from which Megatron cannot count",
                    "name another --save",
                )
    load = args.load
    if args.pretrained_checkpoint and not (load and (Path(load) / TRACKER).is_file()):
        load = args.pretrained_checkpoint  # Megatron chooses it, too
    for name in ("ckpt_fallback", "ckpt_step", "exit_on_missing_checkpoint", "skip_train"):
        if getattr(args, name) and not load:
            what = "would evaluate random weights" if name == "skip_train" else "would start anew"
            raise FlagError(
                name, True, f" without --load, so the run {what}", "give --load, or leave it out"
            )
    if load and _is_checked(args, load):
        step, fallback = args.ckpt_step, args.ckpt_fallback
        names, problem = candidates(Path(load), step, fallback, args.exit_on_missing_checkpoint)
        if not names and problem is None:
            _check_first_start(args, Path(load))
    elif load and args.ckpt_fallback and os.environ.get("RANK", "0") == "0":
        print(f"> --ckpt-fallback can do nothing: how {load} is to be read is not checked here")


def _check_first_start(args: Namespace, load: Path) -> None:
    """Allow ``--load`` of a folder without a checkpoint only if the run will save into it.

    Megatron would train from random weights, whatever the folder holds.
    """
    flag = "--load" if load == Path(args.load or "") else "--pretrained-checkpoint"
    if (load / "config.json").is_file() or any(load.glob("*.safetensors")):
        raise ValueError(
            f"{flag} is {load}, which is a Hugging Face folder: dynmoe convert from-hf --model "
            f"{shlex.quote(str(load))} --save DIR makes a checkpoint of it, for --load DIR."
        )
    if not _is_same(load, args.save):
        found = "holds no checkpoint" if load.is_dir() else "does not exist"
        meant = nearby_checkpoints(load)
        remedy = (
            f"did you mean {meant}?"
            if meant is not None
            else "name the folder that a run saved to, or give it as --save, too, to start there."
        )
        raise ValueError(f"{flag} is {load}, which {found} (no {TRACKER}): {remedy}")
    if args.skip_train:
        raise FlagError(
            "skip_train",
            True,
            f", and {flag} is {load}, which holds no checkpoint yet, so there is nothing to "
            "evaluate",
            "train first, or name the folder of another run",
        )
    if os.environ.get("RANK", "0") == "0":
        print(
            f"> note: {load} holds no checkpoint: this run starts from random weights and saves "
            "there",
            flush=True,
        )


class LoadGuard:
    """Wraps Megatron's load, so that it reads the checkpoint that was chosen and checked."""

    def __init__(self) -> None:
        self._chosen: dict[str, Name | None] = {}
        # The tracker that Megatron is about to read, and what it is to find there.
        self._pinned: tuple[Path, tuple[int, bool]] | None = None

    def checking(self, load_base: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``_load_base_checkpoint``, through which every load goes, twice."""

        @functools.wraps(load_base)
        def checked(load_dir: Any, args: Namespace, rank0: bool = False, **kwargs: Any) -> Any:
            if load_dir is None or not _is_checked(args, load_dir):
                return load_base(load_dir, args, rank0=rank0, **kwargs)
            if rank0 or load_dir not in self._chosen:
                self._chosen[load_dir] = choose_checkpoint(
                    Path(load_dir),
                    args.ckpt_step,
                    fallback=getattr(args, "ckpt_fallback", False),
                    is_required=args.exit_on_missing_checkpoint,
                    # One rank is to write it, and which one is known once the ranks can talk.
                    corrects_tracker=dist.is_initialized() and _is_same(load_dir, args.save),
                )
            name, state_dict = self._chosen[load_dir], kwargs.get("sharded_state_dict")
            if name is not None and state_dict is not None and not rank0:
                folder = Path(load_dir) / checkpoint_name(name)
                check_router_entries(folder, state_dict, args.dist_ckpt_strictness)
                adopt_names(folder, state_dict)
            with self._pinning(args, name, Path(load_dir)):
                return load_base(load_dir, args, rank0=rank0, **kwargs)

        return checked

    def choosing(self, read_metadata: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Wrap ``read_metadata``: whatever the tracker names, Megatron loads what was chosen."""

        @functools.wraps(read_metadata)
        def read(path: Any) -> Any:
            if self._pinned is not None and _is_same(path, self._pinned[0]):
                return self._pinned[1]
            return read_metadata(path)

        return read

    @contextmanager
    def _pinning(self, args: Namespace, name: Name | None, load: Path) -> Iterator[None]:
        if name is None:
            yield
            return
        step = args.ckpt_step
        if isinstance(name, int):
            self._pinned, args.ckpt_step = (load / TRACKER, (name, False)), name
        else:
            self._pinned, args.ckpt_step = (load / TRACKER, (0, True)), None
        try:
            yield
        finally:
            self._pinned, args.ckpt_step = None, step


def choose_checkpoint(
    load: Path,
    step: int | None = None,
    *,
    fallback: bool = False,
    is_required: bool = False,
    corrects_tracker: bool = False,
) -> Name | None:
    """Choose the checkpoint to load, all of whose files are good; all ranks take part.

    Args:
        load: the folder of a run's checkpoints.
        step: an iteration that replaces the tracker's, or None.
        fallback: whether to take the newest good one before it if it is damaged or missing.
        is_required: whether to refuse a folder without any checkpoint.
        corrects_tracker: whether to write the checkpoint found by a fallback into the tracker.

    Returns:
        Its name, or None if there is none and training starts anew.

    Raises:
        CheckpointError: on all ranks: it is damaged or missing, or the tracker names none.
    """
    # Rank 0 looks for all: from another machine the folder may look older for a while.
    names, problem = on_rank_0(lambda: candidates(load, step, fallback, is_required))
    if not names and problem is None:
        return None
    problems = [problem] if problem else []
    for name in names:
        found = faults(load / checkpoint_name(name), looks_closer=fallback)
        if not found:
            if problems:
                on_rank_0(partial(_fall_back, load, problems, name, corrects_tracker))
            elif not step:
                on_rank_0(partial(_mention_newer, load, name))
            return name
        problems += found
    listed = "\n  ".join(problems)
    if fallback:
        raise CheckpointError(
            f"--ckpt-fallback finds no good checkpoint in {load}:\n  {listed}\n"
            "Restore one from a copy, or start anew without --load and with another --save."
        )
    raise CheckpointError(
        f"the checkpoint {checkpoint_name(names[0])} in {load} is damaged:\n  {listed}\n"
        "--ckpt-fallback goes on from the newest good one before it, --ckpt-step N from another. "
        f"Where a file was changed on purpose, delete {MANIFEST} beside it."
    )


def candidates(
    load: Path, step: int | None, fallback: bool, is_required: bool
) -> tuple[list[Name], str | None]:
    """List the checkpoints to try, first choice first, and a problem seen before reading them.

    Raises:
        CheckpointError: there is a problem and ``fallback`` is off; or there is no checkpoint and
            it ``is_required``.
    """
    there = _iterations(load)
    listed = f"iterations there: {', '.join(map(str, there[:10])) or 'none'}"
    tracker, problem = load / TRACKER, None
    wanted: Name | None = step or None
    if wanted is None and tracker.is_file():
        try:
            wanted = read_tracker(tracker)
        except ValueError as error:
            problem = f"{error}; {listed}"
    elif wanted is None:
        if not (fallback and there):
            if is_required:
                raise CheckpointError(
                    f"--load is {load}, which holds no {TRACKER}, and --exit-on-missing-checkpoint "
                    "is given: name the folder that a run saved to, or leave the flag out."
                )
            return [], None
        problem = f"{tracker} is missing; {listed}"
    if wanted is not None and not (load / checkpoint_name(wanted)).is_dir():
        problem = f"{load / checkpoint_name(wanted)} is missing; {listed}"
    if problem is not None and (step or not fallback):
        source = "--ckpt-step" if step else "--load"
        value = step or load
        raise CheckpointError(
            f"{source} is {value}, but {problem}. --ckpt-step N takes iteration N, "
            "--ckpt-fallback the newest good one."
        )
    first = [wanted] if wanted is not None and problem is None else []
    earlier = [n for n in there if wanted is None or (isinstance(wanted, int) and n < wanted)]
    return [*first, *(earlier if fallback else [])], problem


def _iterations(load: Path) -> list[int]:
    """The iterations that have a folder, newest first."""
    matches = (_FOLDER.fullmatch(path.name) for path in load.glob("iter_*"))
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def _mention_newer(load: Path, name: Name) -> None:
    """Say so if the tracker names an older checkpoint than the newest complete one."""
    complete = (n for n in _iterations(load) if (load / checkpoint_name(n) / MANIFEST).is_file())
    newest = next(complete, 0)
    if isinstance(name, int) and newest > name:
        print(
            f"> {load / TRACKER} names iteration {name}, though the save of {newest} was complete: "
            f"--ckpt-step {newest} takes that one",
            flush=True,
        )


def _fall_back(load: Path, problems: list[str], name: Name, corrects_tracker: bool) -> None:
    lines = "\n  ".join(problems)
    print(
        f"{_RULE}\nWARNING: --ckpt-fallback: the checkpoint to load is not good:\n  {lines}\n"
        f"Going on from {load / checkpoint_name(name)}: what was trained after it is lost, and is "
        "trained again.\nDamaged folders stay as they are until a save takes their place.\n"
        f"{_RULE}",
        flush=True,
    )
    if corrects_tracker:  # else the next save would take the damaged one for its predecessor
        replace_file(load / TRACKER, lambda partial: partial.write_text(str(name)))


def _is_checked(args: Namespace, load: Any) -> bool:
    known_format = args.ckpt_format in ("torch_dist", "torch")
    return is_local(load) and known_format and args.non_persistent_ckpt_type is None


def _is_same(one: Any, other: Any) -> bool:
    return bool(one and other) and os.path.realpath(one) == os.path.realpath(other)
