"""A plugin for pytest: a row for every test as soon as it has ended.

python -m pytest -p benchmarks.gpu_first.pytest_rows --rows FILE.csv

What is killed in the middle has left the rows of the tests before.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--rows", type=Path, help="a CSV file, a row for every test")


def pytest_configure(config: Any) -> None:
    path = config.getoption("--rows")
    if path is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Rows(path), "rows of tests")


class Rows:
    """Writes the file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", newline="", buffering=1)
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(["test", "outcome", "seconds", "message"])

    def pytest_runtest_logreport(self, report: Any) -> None:
        """After each part of a test; set-up and tear-down count where they fail or skip."""
        if report.when == "call" or report.outcome != "passed":
            self.write(report.nodeid, report.outcome, report.duration, first_line(report.longrepr))

    def pytest_collectreport(self, report: Any) -> None:
        """After a file was read, or could not be."""
        if report.outcome != "passed":
            self.write(report.nodeid, report.outcome, 0.0, first_line(report.longrepr))

    def write(self, test: str, outcome: str, seconds: float, message: str) -> None:
        self.writer.writerow([test, outcome, f"{seconds:.2f}", message])


def first_line(said: Any) -> str:
    """Of an error or of the reason for skipping."""
    if isinstance(said, tuple):  # of a skipped test: file, line, reason
        said = said[-1]
    crash = getattr(said, "reprcrash", None)
    lines = [line for line in str(crash.message if crash else said or "").splitlines() if line]
    if crash is None:  # of an import that failed: its last line says which
        lines = lines[-1:]
    return lines[0].strip() if lines else ""
