"""Manifests: the size and SHA-256 of every file of a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_dynmoe.storage.atomic import replace_file
from megatron_dynmoe.storage.json_files import read_json, write_json

MANIFEST = "manifest.json"

_HASHED_AT_ONCE = 2**22


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of every file in the folder to ``manifest.json``."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    files = {name: fingerprint(folder / name) for name in names if name != MANIFEST}
    write_json(folder / MANIFEST, {"files": files})


def update_manifest(folder: Path, names: Iterable[str]) -> None:
    """Bring the entries of some files up to date, if the folder has a manifest."""
    path = folder / MANIFEST
    if path.exists():
        manifest = read_json(path)
        manifest["files"] |= {name: fingerprint(folder / name) for name in names}
        replace_file(path, lambda partial: write_json(partial, manifest))


def fingerprint(path: Path, progress: Callable[[int], Any] = lambda _: None) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a manifest has them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_AT_ONCE):
            digest.update(chunk)
            progress(len(chunk))
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def check_manifest(folder: Path, progress: Callable[[int], Any] = lambda _: None) -> None:
    """Compare every file with the manifest, if the folder has one.

    Raises:
        ValueError: a file is missing or differs; the message names it.
    """
    for name, expected in (read_manifest(folder) or {}).items():
        check_file(folder / name, expected, progress)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What the manifest says of each file; None if the folder has none.

    Raises:
        ValueError: the manifest is damaged, or names files elsewhere.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    files = read_json(path).get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path} has no list of files")
    for name, expected in files.items():
        plain_name(name, path)
        if not isinstance(expected, dict) or expected.keys() != {"sha256", "bytes"}:
            raise ValueError(f"{path}: {name} needs exactly sha256 and bytes")
        if type(expected["bytes"]) is not int:
            raise ValueError(f"{path}: {name} has {expected['bytes']!r} bytes, no whole number")
    return files


def check_file(
    file: Path, expected: dict[str, Any], progress: Callable[[int], Any] = lambda _: None
) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        ValueError: it is missing or differs.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing: {MANIFEST} lists it")
    if file.stat().st_size != expected["bytes"]:
        raise ValueError(
            f"{file} has {file.stat().st_size} bytes, {MANIFEST} says {expected['bytes']}: it "
            "is cut short or was changed"
        )
    if fingerprint(file, progress) != expected:
        raise ValueError(f"{file} does not have the SHA-256 of {MANIFEST}: it was changed")


def plain_name(name: Any, source: Path) -> str:
    """The name of a file in the folder of ``source``, which gives it.

    Raises:
        ValueError: it leads elsewhere.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{source} names {name!r}: only files in its own folder are read")
    return name
