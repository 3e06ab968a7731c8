"""What came of a stage: its rows, whether it has failed, and why, in a line."""

from __future__ import annotations

import csv
import io
import re
import signal
from pathlib import Path

from benchmarks.gpu_first.processes import Ended
from benchmarks.gpu_first.stages import Stage

MAX_LINE = 300  # characters of a reason
# "torch.OutOfMemoryError: ...", "AssertionError", "SystemExit: ..."; not "E   ..." of pytest's.
_ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Exit|Interrupt)\b.*")
_BACKGROUND = re.compile(r"Warning\b|^\s|^\[W|^$")


def rows_of(folder: Path) -> list[dict[str, str]]:
    """All rows of a stage's CSV files, each with its file's name; a line cut short is left out."""
    return [
        {"file": path.name} | row
        for path in sorted(folder.glob("*.csv"))
        for row in read_rows(path)
    ]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file that may still be written."""
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = io.StringIO(text[: text.rfind("\n") + 1], newline="")
    return [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(whole)]


def judge(stage: Stage, folder: Path, ended: Ended, rehearses: bool) -> str:
    """Why a stage has failed, in a line; "" if it has not."""
    if ended.why:
        return ended.why
    rows = [row for row in rows_of(folder) if row["file"] == stage.writes]
    if ended.code and (failed := [row for row in rows if row.get("outcome") == "failed"]):
        first = f"{failed[0]['test']}: {failed[0]['message']}"
        return f"{len(failed)} of {len(rows)} tests failed: {first}"[:MAX_LINE]
    if ended.code:
        return reason(read_log(folder), ended.code)
    if stage.writes and not rows:
        return f"wrote no rows to {stage.writes}"
    if rows and all(row.get("failed") for row in rows):
        return rows[0]["failed"][:MAX_LINE]
    ran = stage.kind != "tests" or rehearses or any(row["outcome"] == "passed" for row in rows)
    return "" if ran else f"no test ran: {len(rows)} were skipped"


def reason(log: str, code: int) -> str:
    """The line of a log that says best why its process ended with this code."""
    lines = [line.rstrip() for line in log.splitlines()[1:]]  # without the command
    named = next((line for line in reversed(lines) if _ERROR.match(line)), "")
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"ended by {name}" + (f" after {named}"[:MAX_LINE] if named else "")
    last = next((line for line in reversed(lines) if not _BACKGROUND.search(line)), "")
    return (named or last or f"exit code {code}")[:MAX_LINE]


def read_log(folder: Path) -> str:
    try:
        return (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
