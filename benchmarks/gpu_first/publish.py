"""The three files of OUTPUT: summary.md, rows.csv and archive.tar.gz, each replaced as a whole."""

from __future__ import annotations

import csv
import gzip
import io
import os
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu_first import summary
from benchmarks.gpu_first.outcome import rows_of
from benchmarks.gpu_first.stages import Stage
from benchmarks.gpu_first.state import State

FILES = ("summary.md", "rows.csv", "archive.tar.gz")
MAX_FILE = 8 * 2**20  # bytes: what is larger (a checkpoint, say) stays out of the archive


def publish(
    state: State, stages: Sequence[Stage], output: Path, again: summary.Again, running: str = ""
) -> None:
    """Write all three; whatever ends this process, each file is the old or the new one, whole."""
    output.mkdir(parents=True, exist_ok=True)
    contents = (
        summary.write(state, stages, again, running).encode(),
        _rows(state, stages).encode(),
        _archive(state),
    )
    for name, content in zip(FILES, contents, strict=True):
        _replace(output / name, content, state.folder)


def _replace(path: Path, content: bytes, aside: Path) -> None:
    """Write a file aside first: beside its place, a killed process would leave a fourth one."""
    partial = aside / f".{path.name}.partial"
    partial.write_bytes(content)
    try:
        partial.replace(path)
    except OSError:  # another file system
        beside = path.with_name(f".{path.name}.partial")
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)


def _rows(state: State, stages: Sequence[Stage]) -> str:
    """The rows of all stages under the columns of all of them."""
    rows = [
        {"stage": stage.name} | row
        for stage in stages
        for row in rows_of(state.stage_folder(stage.name))
    ]
    columns = dict.fromkeys(["stage", "file", *(name for row in rows for name in row)])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _archive(state: State) -> bytes:
    """state.json and the stages' folders. A file that grows meanwhile is taken as far as it is."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for path in [state.folder / "state.json", *sorted(state.folder.glob("stages/**/*"))]:
            inside = path.relative_to(state.folder)
            if any(part.startswith(".") for part in inside.parts):  # being written
                continue
            with suppress(FileNotFoundError):
                if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE:
                    continue
                content = path.read_bytes()
                member = tarfile.TarInfo(str(inside))
                member.size, member.mtime = len(content), int(path.stat().st_mtime)
                tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()
