"""What the benchmarks share: turns, statistics, the machine's ceilings, and rows of CSV.

A row begins with what was measured on: date, commit, hardware, versions. Providers take turns,
because the speed of a machine drifts: every round runs each of them once, in an order that rotates,
and a ratio is taken within a round.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import itertools
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from megatron_dynmoe.storage.atomic import replace_file

Result = TypeVar("Result")

PRODUCT_SECONDS, PROBE_WIDTH = 0.5, 256  # of the product that tells a machine's FLOP/s

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
# Data sheets, by a part of the name that the driver gives a device.
DATA_SHEETS = {
    "H200": "h200-141g",
    "H100 80GB HBM3": "h100-80g",
    "H100 PCIe": "h100-pcie-80g",
    "A100": "a100-80g",
    "A800": "a800-80g",
}
MIN_ROUNDS = 5  # however short the time


def on_gpu() -> bool:
    """Whether there is a CUDA device and the CPU layer does not stand in for it."""
    from megatron_dynmoe.backends import cpu

    return not cpu.is_installed() and torch.cuda.is_available()


# --- turns ---------------------------------------------------------------------------------------


def take_turns[Result](
    providers: Mapping[str, Callable[[], Result]],
    rounds: int,
    warm_up: int = 3,
    seconds: float = math.inf,
) -> dict[str, list[Result]]:
    """Call every provider once a round.

    Args:
        providers: name to function.
        rounds: how many rounds count.
        warm_up: how many rounds run before those.
        seconds: after this time no further round begins, if ``MIN_ROUNDS`` are done.

    Returns:
        The functions' results, in the order of the rounds.
    """
    results: dict[str, list[Result]] = {name: [] for name in providers}
    names = list(providers)
    stop = time.monotonic() + seconds
    for number in range(-warm_up, rounds):
        if number >= MIN_ROUNDS and time.monotonic() > stop:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            result = providers[name]()
            if number >= 0:
                results[name].append(result)
    return results


def without_failing(
    providers: Mapping[str, Callable[[], Any]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The providers that run, and the reasons why the others do not (out of memory, say)."""
    running, failures = {}, {}
    for name, function in providers.items():
        try:
            function()
            running[name] = function
        except RuntimeError as error:
            failures[name] = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"{name} is left out: {failures[name]}")
    return running, failures


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


# --- the machine's ceilings ----------------------------------------------------------------------


class Ceilings(NamedTuple):
    """The best speeds of this machine, in this run, with this number of threads."""

    bytes_per_s: float  # of a copy, read and written
    flops_per_s: float  # of a square matrix product

    def seconds(self, flops: float = 0, num_bytes: float = 0) -> float:
        """The roofline: the least seconds that this much work can take."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


def ceilings(dtype: torch.dtype, scale: float = 1.0) -> Ceilings:
    """Measure products of random matrices, and copies larger than caches; take the best of several.

    Args:
        dtype: dtype of the matrices.
        scale: factor of all sizes, for tests.
    """
    width, num_bytes = (8192, 2**32) if on_gpu() else (2048, 2**28)
    width, num_bytes = max(8, int(width * scale)), max(1024, int(num_bytes * scale))
    width = min(width, _width_within(PRODUCT_SECONDS, dtype))
    copy, product = _copy_and_product(dtype, width, num_bytes)
    if on_gpu():
        torch.cuda.empty_cache()  # the memory is the benchmark's again
    return Ceilings(2 * num_bytes / copy, 2 * width**3 / product)


def _width_within(seconds: float, dtype: torch.dtype) -> int:
    """The width of a matrix product that takes about this long, estimated from a small one.

    A CPU without instructions for bf16 is more than a hundred times slower in it than in float32.
    """
    small = torch.ones(PROBE_WIDTH, PROBE_WIDTH, device="cuda" if on_gpu() else "cpu").to(dtype)
    taken = min(timed(lambda: small @ small)[0] for _ in range(2))
    return max(PROBE_WIDTH, int(PROBE_WIDTH * (seconds / taken) ** (1 / 3)))


def _copy_and_product(dtype: torch.dtype, width: int, num_bytes: int) -> tuple[float, float]:
    """The least seconds that each function has taken."""
    device = torch.device("cuda" if on_gpu() else "cpu")
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    providers = {
        "copy": lambda: timed(lambda: target.copy_(source))[0],
        "product": lambda: timed(lambda: torch.mm(left, right, out=product))[0],
    }
    seconds = take_turns(providers, rounds=7)
    return min(seconds["copy"]), min(seconds["product"])


def data_sheet_flops() -> float | None:
    """The vendor's figure for bf16 without sparsity, or None if it is not known."""
    from megatron_dynmoe.planning.gpus import GPUS

    if not on_gpu():
        return None
    name = torch.cuda.get_device_name()
    return next((GPUS[gpu].flops for part, gpu in DATA_SHEETS.items() if part in name), None)


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


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file, and add the columns that it lacks."""
    old: list[dict[str, Any]] = []
    columns: list[str] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            old, columns = list(reader), list(reader.fieldnames or [])
    columns += [
        name for name in dict.fromkeys(n for row in rows for n in row) if name not in columns
    ]
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows([*old, *rows])

    replace_file(path, write)
