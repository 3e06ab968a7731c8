"""What the benchmarks share: a clock, statistics, and rows of CSV.

A row begins with who measured: date, commit, hardware, versions. This is asked first, and a row is
on the disk as soon as it is measured.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import itertools
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_dynmoe.storage.atomic import replace_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The commit of the code that is about to be imported, with "+" if files differ from it. For a copy
# of the tree without its history the environment can name the commit.
_GIT = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
COMMIT = (
    os.environ.get("BENCHMARK_COMMIT")
    or subprocess.run(_GIT, capture_output=True, text=True).stdout.strip()
    or "unknown"
)


def on_gpu() -> bool:
    """Whether there is a CUDA device and the CPU layer does not stand in for it."""
    from megatron_dynmoe.backends import cpu

    return not cpu.is_installed() and torch.cuda.is_available()


def timed(*functions: Callable[[], Any], repeats: int = 1) -> tuple[float, ...]:
    """Seconds of each function; they are called one after another, ``repeats`` times in all.

    On a GPU, its own clock measures the time between the functions, and the host does not wait.
    """
    if not on_gpu():
        marks = [time.perf_counter()]
        for function in functions:
            for _ in range(repeats):
                function()
            marks.append(time.perf_counter())
        return tuple((end - start) / repeats for start, end in itertools.pairwise(marks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(functions) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for function, end in zip(functions, events[1:], strict=True):
        for _ in range(repeats):
            function()
        end.record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(events)
    return tuple(start.elapsed_time(end) / 1e3 / repeats for start, end in pairs)


# --- statistics ----------------------------------------------------------------------------------


class Spread(NamedTuple):
    """The spread of several measurements."""

    median: float
    p20: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), p20, p80)


class Ratio(NamedTuple):
    """A median with its confidence interval of 95 %."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(numerators: Sequence[float], denominators: Sequence[float], paired: bool = True) -> Ratio:
    """How many times as large the first measurements are as the second.

    Args:
        paired: whether both were measured in the same rounds. If so, the result is the median of
            the rounds' ratios, else the ratio of the medians. The interval is from a bootstrap.
    """
    generator = random.Random(0)
    if paired:
        ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
        middle = statistics.median(ratios)
        draws = [_resampled_median(ratios, generator) for _ in range(2000)]
    else:
        middle = statistics.median(numerators) / statistics.median(denominators)
        draws = [
            _resampled_median(numerators, generator) / _resampled_median(denominators, generator)
            for _ in range(2000)
        ]
    draws.sort()
    return Ratio(middle, draws[50], draws[1949])


def _resampled_median(values: Sequence[float], generator: random.Random) -> float:
    return statistics.median(generator.choices(values, k=len(values)))


# --- rows ----------------------------------------------------------------------------------------


def identity(*packages: str) -> dict[str, str]:
    """The first columns of a row."""
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": COMMIT,
        "hardware": hardware(),
        "versions": ", ".join([f"python {platform.python_version()}", *versions]),
    }


def hardware() -> str:
    """The hardware: the GPU, or the machine and its processor."""
    if on_gpu():
        return torch.cuda.get_device_name()
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {models[0] if models else 'unknown'}"


def load() -> str:
    """The machine's load over the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


class Rows:
    """Rows for a CSV file, which are on the disk as soon as they are put.

    Who measures is asked when the object is made, before any work.
    """

    def __init__(self, path: Path | None, *packages: str) -> None:
        """``packages`` are those whose versions a row tells. Without a path nothing is written."""
        self._identity, self._path = identity(*packages), path
        self._old: list[dict[str, Any]] = []
        self._columns: list[str] = []
        self._new: dict[object, dict[str, Any]] = {}
        if path and path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self._old, self._columns = list(reader), list(reader.fieldnames or [])
        elif path:
            path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def new(self) -> list[dict[str, Any]]:
        """Those that this object has put, with their identity."""
        return [*self._new.values()]

    def put(self, row: Mapping[str, Any], name: object = None) -> dict[str, Any]:
        """Write a row and its identity. Columns that the file lacks are added to it.

        Args:
            name: if there is one, the row takes the place of the last one put under this name.

        Returns:
            The whole row.
        """
        whole = {**self._identity, **row}
        self._new[len(self._new) if name is None else name] = whole
        self._columns += [column for column in whole if column not in self._columns]
        if self._path:
            replace_file(self._path, self._write)
        return whole

    def _write(self, partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows([*self._old, *self._new.values()])
