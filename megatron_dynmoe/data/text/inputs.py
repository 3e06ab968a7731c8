"""Finds the text files that a command line names: by paths, folders and globs."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_dynmoe.settings.messages.command_line import UsageError

COMPRESSED = (".gz", ".zst", ".zstd")
# Text files end like this. A folder gives only such files; a file that is named may end otherwise.
ENDINGS = (".jsonl", ".ndjson", ".json", ".txt", ".parquet", *COMPRESSED)


def expand_inputs(patterns: Sequence[str], flag: str = "--input") -> list[Path]:
    """The input files named by `patterns`, each a path, a folder or a glob, in the order given.

    Args:
        flag: by which they are given, for what is said of them.

    The files of a folder and of those below it, and those of one glob, come sorted by name, so that
    the output does not depend on the file system.

    Raises:
        UsageError: a pattern names no file of text, or one that was named before.
    """
    paths: dict[Path, None] = {}  # ordered, and quick to look up in
    for pattern in patterns:
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise UsageError(
                f"{flag} is {pattern}: there is no such file, and no file matches it as a pattern"
            )
        for name in names:
            for path in _files_of(Path(name), flag):
                if path in paths:
                    raise UsageError(f"{flag}: {path} is named twice: it would be read twice")
                paths[path] = None
    return list(paths)


def is_plain_text(path: Path) -> bool:
    """Whether a file is plain text, perhaps compressed, and not records with fields."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1:] == [".txt"]


def name_without_endings(path: Path) -> str:
    """A file's name without the endings for format and compression."""
    while path.suffix.lower() in ENDINGS and path.stem:
        path = path.with_suffix("")
    return path.name


def _files_of(path: Path, flag: str) -> list[Path]:
    """The file itself, or what a folder holds of text."""
    if not path.is_dir():
        _refuse_arrow(path, flag)
        return [path]
    files = sorted(_visible_files(path))
    for file in files:
        _refuse_arrow(file, flag)
    texts = [file for file in files if file.suffix.lower() in ENDINGS]
    if not texts:
        raise UsageError(
            f"{flag} is {path}: the folder holds no text, which is in files whose names end in "
            f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        )
    return texts


def _visible_files(folder: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        yield from (Path(name, file) for file in files if not file.startswith("."))


def _refuse_arrow(path: Path, flag: str) -> None:
    """Say how an Arrow file, or the folder of `datasets` that it is part of, becomes Parquet."""
    if path.suffix.lower() != ".arrow":
        return
    folder, part, what = path.parent, "", "an Arrow file"
    load, target = f"datasets.Dataset.from_file({str(path)!r})", path.with_suffix(".parquet").name
    if (folder / "state.json").exists():
        target = f"{folder.name}.parquet"
        if (folder.parent / "dataset_dict.json").exists():
            folder, part = folder.parent, f"[{folder.name!r}]"
        what = f"an Arrow file of {folder}, which save_to_disk wrote"
        load = f"datasets.load_from_disk({str(folder)!r}){part}"
    raise UsageError(
        f"{flag}: {path} is {what}, and Arrow is not read: give Parquet, which this makes of it: "
        f'python -c "import datasets; {load}.to_parquet({target!r})"'
    )
