"""All that can be said of a checkpoint without loading it, as lines of the doctor's table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_dynmoe.conversion.megatron.settings import can_be_converted
from megatron_dynmoe.conversion.sources import FromFolder, FromMegatron, progress_bar
from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check
from megatron_dynmoe.doctor.checkpoint.checks.controller import check_router_state
from megatron_dynmoe.doctor.checkpoint.checks.copies import check_copies
from megatron_dynmoe.doctor.checkpoint.checks.progress import check_progress, check_tracker
from megatron_dynmoe.doctor.checkpoint.checks.structure import check_optimizer, check_structure
from megatron_dynmoe.doctor.checkpoint.checks.values import Values
from megatron_dynmoe.doctor.checkpoint.reading.distributed import Distributed
from megatron_dynmoe.doctor.checkpoint.reading.hugging_face import HuggingFace
from megatron_dynmoe.doctor.checkpoint.reading.parts import RESTORE, Opened, failure
from megatron_dynmoe.doctor.checkpoint.reading.rank_files import RankFiles
from megatron_dynmoe.jobs.display import show_bytes
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.storage.manifest import MANIFEST, check_file, read_manifest
from megatron_dynmoe.storage.megatron_names import (
    RELEASE,
    TRACKER,
    checkpoint_name,
    nearby_checkpoints,
    read_tracker,
)

_CONFIG = "config.json"
_SHOWN = 6  # lines of one check: a damaged file may give hundreds


def look(path: Path, shows_progress: bool = False) -> list[Check]:
    """Look into a checkpoint; memory holds one stored tensor at a time.

    Args:
        path: what ``--load`` names, the folder of one iteration, or an exported folder.

    Raises:
        UsageError: there is no checkpoint.
    """
    return [*_few(_checks(path, shows_progress))]


def _checks(path: Path, shows_progress: bool) -> Iterator[Check]:
    folder = _folder(path)
    if isinstance(folder, Check):
        yield folder
        return
    kind = _kind(folder)
    assert kind is not None
    total = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    with progress_bar("checking hashes", total, shows_progress) as bar:
        yield from _manifest(folder, kind, bar.update)
    try:
        opened: Opened = kind(folder)
    except Exception as error:
        yield failure("files", error, "; nothing else was looked at")
        return
    yield from opened.faults
    args, iteration, state = opened.args, opened.iteration, opened.states
    values = Values(norms_around_zero=bool(getattr(args, "layernorm_zero_centered_gamma", False)))
    yield from _guarded("values", lambda: _look_at_values(opened, values, shows_progress))
    origin = getattr(args, "huggingface_source", None)
    is_upcycled = getattr(args, "moe_use_upcycling", False) or "upcycling" in (origin or {})
    yield from _guarded("copies", lambda: check_copies(values, is_upcycled))
    yield from _guarded("shapes", lambda: _shapes(opened))
    if args is None or iteration is None:
        return
    yield from _guarded("layers and experts", lambda: check_structure(values, args, folder))
    yield from _guarded("optimizer", lambda: [check_optimizer(values, args, iteration)])
    yield from _guarded("tracker", lambda: [check_tracker(folder, iteration)])
    yield from _guarded("progress", lambda: check_progress(args, iteration, state))
    scalars = values.scalars
    yield from _guarded(
        "router state", lambda: check_router_state(scalars, args, iteration, folder)
    )


def _look_at_values(opened: Opened, values: Values, shows_progress: bool) -> Iterator[Check]:
    with progress_bar("looking", opened.num_bytes, shows_progress) as bar:
        for part in opened.parts():
            if isinstance(part, Check):
                yield part
            else:
                values.add(part, opened.weight_dtype(part.row))
                bar.update(part.tensor.nbytes)
    shown = f"{values.num_parts} parts of tensors, {show_bytes(values.num_bytes)}"
    passed = Check("values", PASSED, f"{shown}: all finite, no weight constant")
    yield from [*values.checks()] or [passed]


def _folder(path: Path) -> Path | Check:
    """The folder to look into, or what is wrong on the way to it."""
    if not path.is_dir():
        meant = nearby_checkpoints(path)
        remedy = f"; did you mean {meant}?" if meant is not None else ""
        raise UsageError(f"--checkpoint is {path}: there is no such folder{remedy}")
    if _kind(path) is not None:
        return path
    tracker = path / TRACKER
    there = sorted(folder.name for folder in (*path.glob("iter_*"), *path.glob(RELEASE)))
    if not tracker.is_file() and not there:
        meant = nearby_checkpoints(path)
        remedy = f"did you mean {meant}?" if meant else "name what --save or --run-dir named."
        raise UsageError(f"--checkpoint is {path}, which holds no checkpoint: {remedy}")
    listed = f"there are {', '.join(there) or 'none'}"
    remedy = "name one of them, resume with --ckpt-fallback, or write a good one's number into it"
    if not tracker.is_file():
        return Check("tracker", FAILED, f"{tracker} is missing; {listed}", remedy)
    try:
        folder = path / checkpoint_name(read_tracker(tracker))
    except ValueError as error:
        return Check("tracker", FAILED, f"{error}; {listed}", remedy)
    if not folder.is_dir():
        return Check("tracker", FAILED, f"{tracker} names {folder.name}; {listed}", remedy)
    if _kind(folder) is None:
        found = f"{folder} holds neither .metadata nor files of ranks: its save was cut short"
        return Check("files", FAILED, found, RESTORE)
    return folder


def _kind(folder: Path) -> Callable[[Path], Opened] | None:
    """What opens a folder; None if it is not a checkpoint."""
    if (folder / _CONFIG).is_file():
        return HuggingFace
    if (folder / ".metadata").is_file():
        return Distributed
    return RankFiles if any(folder.glob("mp_rank_*")) else None


def _manifest(
    folder: Path, kind: Callable[[Path], Opened], progress: Callable[[int], object]
) -> Iterator[Check]:
    name = "manifest"
    try:
        files = read_manifest(folder)
    except ValueError as error:
        yield Check(name, FAILED, str(error), RESTORE)
        return
    if files is None:
        if kind is RankFiles:
            found = "the format torch has none; its files' own checksums are read"
            yield Check(name, PASSED, found)
        else:
            found = f"{folder} has no {MANIFEST}"
            yield Check(name, WARNING, found, "whether its files are as they were is not known")
        return
    wrong = []
    for file, expected in files.items():
        try:
            check_file(folder / file, expected, progress)
        except (ValueError, OSError) as error:
            wrong.append(Check(name, FAILED, str(error), RESTORE))
    yield from wrong or [Check(name, PASSED, f"{len(files)} files are those of {MANIFEST}")]


def _shapes(opened: Opened) -> Iterator[Check]:
    """The converter's own comparison of every tensor with the settings, if it knows the model."""
    if isinstance(opened, HuggingFace):
        FromFolder(opened.folder, is_checked=True)
        yield Check("shapes", PASSED, f"every tensor is there as {_CONFIG} says")
    elif isinstance(opened, Distributed) and opened.args and can_be_converted(opened.args):
        FromMegatron(opened.folder, is_checked=True)
        yield Check("shapes", PASSED, "every tensor is there as the saved arguments say")


def _guarded(name: str, checks: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Run checks; if one raises an error, that is a result, too."""
    try:
        yield from checks()
    except Exception as error:
        yield failure(name, error)


def _few(checks: Iterable[Check]) -> Iterator[Check]:
    """The checks without the same one's seventh finding and later ones, of which it says so."""
    seen: dict[str, list[Check]] = defaultdict(list)
    for check in checks:
        seen[check.name].append(check)
        if len(seen[check.name]) <= _SHOWN:
            yield check
    for name, found in seen.items():
        if more := found[_SHOWN:]:
            state = FAILED if any(check.state == FAILED for check in more) else more[-1].state
            yield Check(name, state, f"and {len(more)} more findings of this kind", more[-1].remedy)
