"""Refuses an output that a command line names and that cannot be written, before any work."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.storage.atomic import check_target


def check_new_folder(
    target: Path, overwrite: bool | None, source: Path | None = None, flag: str = "--output"
) -> None:
    """Ask :func:`megatron_dynmoe.storage.atomic.check_target`, and name the flag.

    Raises:
        UsageError: the folder may not be written.
    """
    try:
        check_target(target, overwrite, source)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error


def check_parent(output: Path | str, flag: str = "--output") -> None:
    """Refuse an output whose folder is not there.

    Raises:
        UsageError: there is no such folder.
    """
    folder = os.path.dirname(output) or "."  # of a prefix such as folder/, too
    if not os.path.isdir(folder):
        raise UsageError(f"{flag} is {output}: there is no folder {folder}: create it")


def check_absent(file: Path, overwrite: bool, flag: str = "--output") -> None:
    """Refuse a file that is there; its name begins with a prefix that the flag gives.

    Raises:
        UsageError: the file is there, and ``overwrite`` is not given.
    """
    if file.exists() and not overwrite:
        raise UsageError(f"{flag}: {file} exists: give another prefix, or --overwrite")
