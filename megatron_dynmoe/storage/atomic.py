"""Names of a run's checkpoints, and files that are replaced whole; imports no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


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


@contextmanager
def new_folder(target: Path, overwrite: bool | None) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place when the block ends well, and else vanishes.

    Raises:
        ValueError: the target exists and is not empty, and ``overwrite`` is not given.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    beside.chmod(0o777 & ~current_umask())
    try:
        yield beside
        if target.exists():
            _replace(target, beside)
        else:
            beside.rename(target)
    except OSError as error:
        if error.filename is None:  # a full disk, for one
            raise OSError(f"{target} cannot be written: {error}") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_target(target: Path, overwrite: bool | None, source: Path | None = None) -> None:
    """Whether a folder may be written; worth asking before hours of reading.

    Args:
        overwrite: None if the caller has no flag ``--overwrite``.
        source: the folder that is read, whose files nothing may replace.

    Raises:
        ValueError: the target is a file, lies in one or where nothing may be written, is not empty,
            or shares files with the source.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: name a folder")
    above = next(path for path in Path(os.path.abspath(target)).parents if path.exists())
    if not above.is_dir():
        raise ValueError(f"{target}: {above} is a file: name a folder elsewhere")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{target}: nothing may be written in {above}: name a folder elsewhere")
    if source is not None:
        here, there = target.resolve(), source.resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise ValueError(
                f"{target} is, holds or lies in {source}, which is read: name a folder elsewhere"
            )
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        remedy = "" if overwrite is None else ", or give --overwrite"
        raise ValueError(f"{target} is not empty: name another folder{remedy}")


def _replace(target: Path, new: Path) -> None:
    """Put a folder in another's place; the old one goes only when the new one is there."""
    parked = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    old = target.rename(parked / target.name)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        parked.rmdir()
        raise
    shutil.rmtree(parked)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def nearest_existing(path: Path) -> Path:
    """The path itself, or the folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
