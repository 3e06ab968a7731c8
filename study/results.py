"""Reads the numbers of finished runs from their folders, keeps them and compares them."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_dynmoe.runs import metric_names
from megatron_dynmoe.runs.drawing import overlay
from megatron_dynmoe.runs.events import layers, read_run
from megatron_dynmoe.runs.summary import TAIL, summarize_run
from megatron_dynmoe.storage.atomic import replace_file
from study import flops
from study.fingerprint import ROOT
from study.runs import Run

RESULTS = ROOT / "study" / "results"
NOT_CLEAR = "not clear"  # the verdict of a comparison within its error
EDGE = 0.1  # a verdict is barely clear if its interval ends within this share of its error from 0

# Shares of the target, the two bands by which control engineering defines settling: a count is held
# from a step within the first band on if it never leaves the second band again.
TOLERANCE, WORST = 0.02, 0.05
MEAN_STEPS = 10
CURVE_POINTS = 100
_NO_CURVES = ("curve", "validation_curve", "experts_by_layer")


def row_of(run: Run, held_out: dict[str, float]) -> dict[str, Any]:
    """The numbers of a finished run; "the end" of a run is its last fifth.

    Args:
        held_out: the result of :func:`study.afterwards.held_out`.
    """
    resolved, scalars = read_run(run.folder)
    summary = summarize_run(resolved, scalars)
    drawn = overlay.read(run.folder, run.name)
    tokens_per_step = drawn.tokens[-1] / summary["iterations"]
    row: dict[str, Any] = {
        "variant": run.variant.name,
        "seed": run.seed,
        "commit": run.commit,
        "steps": summary["iterations"],
        "tokens": int(drawn.tokens[-1]),
        **held_out,
        flops.FLOPS: flops.measured(run),
        "seconds_per_step": tokens_per_step / summary["tokens_per_second"],
        "processor_seconds_per_step": run.processor_seconds_per_step(),
        "experts_per_token": summary["mean_experts_per_token"],
        "std_experts_per_token": summary["std_experts_per_token"],
        "threshold": summary["final_threshold"],
    }
    if drawn.threshold is not None:
        assert drawn.experts is not None
        late = drawn.experts[len(drawn.experts) // 5 :]
        row |= {
            "fewest_experts_per_token": late.min(),
            "most_experts_per_token": late.max(),
            "experts_by_layer": [
                statistics.fmean(tail(series.values))
                for series in layers(scalars, metric_names.EXPERTS_OF_LAYER).values()
            ],
            "validation_curve": {
                "tokens": drawn.validation[0],
                "experts": scalars[metric_names.VALIDATION_EXPERTS].values,
                "std_experts": scalars[metric_names.VALIDATION_STD_EXPERTS].values,
            },
            "curve": {
                "tokens": _thin(drawn.tokens),
                "experts": _thin(drawn.experts),
                "std_experts": _thin(np.array(scalars[metric_names.STD_EXPERTS].values)),
                "threshold": _thin(drawn.threshold),
            },
        }
    if drawn.target is not None:
        assert drawn.experts is not None
        row |= settling(drawn.experts, float(drawn.target[-1]))
    return _rounded(row)


def settling(experts: Sequence[float] | np.ndarray, target: float) -> dict[str, Any]:
    """From which step on a count is held, and how far it strays, in shares of the target.

    The function looks at means over ten steps, because the count of a single small batch is off by
    more than 2 % by chance. The count is held from the first step at which this mean is within 2 %
    and after which no mean is beyond 5 %. A count that begins at its target and leaves it, or only
    passes it, is not held yet.

    Returns:
        ``peak_excursion`` and ``peak_step``, of the mean that is farthest off in the whole run;
        ``held_from_step``, None if the count is never held; from there on ``worst_excursion`` of
        any mean and ``worst_step`` of any later single step.
    """
    counts = np.asarray(experts, dtype=float)
    names = ("peak_excursion", "peak_step", "held_from_step", "worst_excursion", "worst_step")
    found: dict[str, Any] = dict.fromkeys(names)
    if len(counts) < MEAN_STEPS:
        return found
    means = np.convolve(counts, np.full(MEAN_STEPS, 1 / MEAN_STEPS), mode="valid")
    errors = np.abs(means / target - 1).round(9)  # smaller ones are rounding errors
    peak = int(errors.argmax())
    found |= {"peak_excursion": float(errors[peak]), "peak_step": peak + MEAN_STEPS}
    worst_from_here = np.maximum.accumulate(errors[::-1])[::-1]
    held = (errors <= TOLERANCE) & (worst_from_here <= WORST)
    if held.any():
        first = int(held.argmax())
        later = np.abs(counts[first + MEAN_STEPS :] / target - 1)
        found |= {
            "held_from_step": first + MEAN_STEPS,
            "worst_excursion": float(worst_from_here[first]),
            "worst_step": float(later.max()) if len(later) else None,
        }
    return found


def write(folder: Path, size_name: str, content: dict[str, Any]) -> None:
    """Write the results as JSON, and the single numbers of each run as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{size_name}.json"
    # One line per run keeps the file small and its history readable.
    parts = [f"{json.dumps(name)}: {_lines(value)}" for name, value in content.items()]
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    replace_file(path, lambda partial: partial.write_text(text))
    names = list(dict.fromkeys(name for row in content["runs"] for name in row))
    with open(folder / f"{size_name}.csv", "w", newline="") as file:
        table = csv.DictWriter(
            file,
            [name for name in names if name not in _NO_CURVES],
            extrasaction="ignore",
            lineterminator="\n",
        )
        table.writeheader()
        table.writerows(content["runs"])


def tail(values: Sequence[float]) -> Sequence[float]:
    """The last fifth."""
    return values[-max(1, math.ceil(len(values) * TAIL)) :]


class Comparison(NamedTuple):
    """A difference of two means; ``error`` is half of its interval."""

    first: float
    second: float
    error: float

    @property
    def difference(self) -> float:
        return self.first - self.second

    @property
    def is_lower(self) -> bool | None:
        """Whether the first is lower; None if the difference is within its error."""
        return None if abs(self.difference) <= self.error else self.difference < 0

    @property
    def is_barely_clear(self) -> bool:
        """Whether the interval ends so near to 0 that a little more noise would reach it."""
        return 0 < abs(self.difference) - self.error <= EDGE * self.error

    @property
    def interval(self) -> str:
        """The difference and its ends; without them if nothing is known of the error."""
        text = f"{self.difference:+.4f}"
        if math.isinf(self.error):
            return text
        low, high = self.difference - self.error, self.difference + self.error
        return f"{text} ({low:+.4f} to {high:+.4f})"

    def verdict(self, lower: str, higher: str) -> str:
        """What the first is, or ``not clear``; no word if nothing is known of the error."""
        if math.isinf(self.error):
            return ""
        if self.is_lower is None:
            return NOT_CLEAR
        return (lower if self.is_lower else higher) + ", barely" * self.is_barely_clear


def compared(first: Sequence[float], second: Sequence[float], noise: float | None) -> Comparison:
    """Compare the means of two groups of runs.

    Args:
        noise: the standard deviation that seeds alone cause, if it is known.
    """
    seeds = math.sqrt(sum(1 / len(group) for group in (first, second)))
    error = math.inf if noise is None else 2 * noise * seeds
    return Comparison(statistics.fmean(first), statistics.fmean(second), error)


def paired(
    first: Sequence[float], second: Sequence[float], *, by_student: bool = False
) -> Comparison:
    """Compare two numbers of each seed; the error is from the spread of their difference.

    Args:
        by_student: the error is half of a 95 % interval, not two standard errors.
    """
    differences = [one - other for one, other in zip(first, second, strict=True)]
    error, number = math.inf, len(differences)
    if number > 1:
        errors = errors_in_95(number - 1) if by_student else 2
        error = errors * statistics.stdev(differences) / math.sqrt(number)
    return Comparison(statistics.fmean(first), statistics.fmean(second), error)


# A variant stands apart if chance makes the noise of any so large less often than this.
STANDS_OUT = 0.05


class Noise(NamedTuple):
    """What neither the variant of a run nor its seed explains.

    Attributes:
        deviation: its standard deviation.
        freedom: of how many degrees of freedom this was estimated.
        apart: the variants that are not held to it, because their own stands out.
    """

    deviation: float
    freedom: int
    apart: frozenset[str] = frozenset()


def noise_beside_seeds(found: Mapping[str, Mapping[int, float]]) -> Noise | None:
    """Estimate the noise from variants that have several seeds; None if no two have the same ones.

    A seed decides the order of the text and the first weights, and so moves all variants alike.
    What is left after the means of variants and those of seeds are taken away is noise, for which
    V variants with S seeds have (V - 1) (S - 1) degrees of freedom. Variants with the same seeds
    are taken together.

    Args:
        found: the numbers of each variant by seed.
    """
    by_seeds: dict[tuple[int, ...], dict[str, list[float]]] = {}
    for name, group in found.items():
        if len(group) > 1:
            seeds = tuple(sorted(group))
            by_seeds.setdefault(seeds, {})[name] = [group[seed] for seed in seeds]
    squares, degrees, apart = 0.0, 0, set[str]()
    for of_variants in by_seeds.values():
        alike = _with_common_noise(of_variants)
        apart |= of_variants.keys() - alike.keys()
        squares += _beside_means(alike)
        degrees += (len(alike) - 1) * (len(next(iter(alike.values()))) - 1)
    return Noise(math.sqrt(squares / degrees), degrees, frozenset(apart)) if degrees else None


def compared_by_seed(
    found: Mapping[str, Mapping[int, float]], first: str, second: str, noise: Noise | None
) -> Comparison:
    """Compare two variants by the seeds that both have; the error is half of a 95 % interval.

    If one of the two stands apart, the noise is that of the pair's own differences.
    """
    shared = sorted(found.get(first, {}).keys() & found.get(second, {}).keys())
    if not shared:
        return Comparison(math.nan, math.nan, math.inf)
    ours, theirs = ([found[name][seed] for seed in shared] for name in (first, second))
    means = statistics.fmean(ours), statistics.fmean(theirs)
    if noise is None:
        return Comparison(*means, math.inf)
    variance, degrees = 2 * noise.deviation**2, noise.freedom
    if not noise.apart.isdisjoint((first, second)):
        if len(shared) == 1:
            return Comparison(*means, math.inf)
        variance, degrees = float(np.subtract(ours, theirs).var(ddof=1)), len(shared) - 1
    return Comparison(*means, errors_in_95(degrees) * math.sqrt(variance / len(shared)))


def _with_common_noise(of_variants: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The variants whose noise does not stand out; the others are left out one by one."""
    from scipy import stats  # of the tests' extra

    alike = dict(of_variants)
    while len(alike) > 2:
        all_squares, without = _beside_means(alike), {}
        for name in alike:
            others = {other: alike[other] for other in alike if other != name}
            without[name] = _beside_means(others)
        worst = min(without, key=lambda name: without[name])
        if without[worst] <= 1e-9 * all_squares:  # rounding errors tell nothing of noise
            break
        own = len(alike[worst]) - 1
        rest = (len(alike) - 2) * own
        ratio = (all_squares - without[worst]) / own / (without[worst] / rest)
        # Fisher's F test, for the worst of so many
        if stats.f.sf(ratio, own, rest) * len(alike) >= STANDS_OUT:
            break
        del alike[worst]
    return alike


def _beside_means(by_variant: Mapping[str, list[float]]) -> float:
    """The sum of the squares of what the means of variants and those of seeds leave."""
    values = np.array(list(by_variant.values()))
    of_variants, of_seeds = values.mean(axis=1, keepdims=True), values.mean(axis=0)
    return float(((values - of_variants - of_seeds + values.mean()) ** 2).sum())


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within groups of runs that differ by their seed; None if none do."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        return None
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in several)
    return math.sqrt(squares / freedom(several))


def freedom(groups: Sequence[Sequence[float]]) -> int:
    """The degrees of freedom of :func:`pooled_deviation`."""
    return sum(len(group) - 1 for group in groups if group)


def errors_in_95(degrees: int) -> float:
    """How many standard errors the half of a 95 % interval is, by Student's distribution."""
    from scipy import stats  # of the tests' extra

    return float(stats.t.ppf(0.975, degrees))


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage, as the page writes it."""
    return f"{100 * share:.{digits}f} %"


class Results:
    """The results of a size, by variant."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.rows: dict[str, list[dict[str, Any]]] = {}
        for row in content["runs"]:
            self.rows.setdefault(row["variant"], []).append(row)

    @classmethod
    def read(cls, path: Path) -> Results | None:
        """The results that :func:`write` wrote, or None if there are none."""
        return cls(json.loads(path.read_text())) if path.is_file() else None

    def values(self, variant: str, name: str) -> list[float]:
        """One number of each seed."""
        return [row[name] for row in self.rows[variant] if row.get(name) is not None]

    def by_seed(self, variant: str, name: str) -> dict[int, float]:
        """The same by seed."""
        return {row["seed"]: row[name] for row in self.rows[variant] if row.get(name) is not None}

    def mean(self, variant: str, name: str) -> float:
        return statistics.fmean(self.values(variant, name))

    def experts(self, variant: str) -> list[float]:
        """Experts per token of each seed, on the held-out text."""
        return self.values(variant, "validation_experts_per_token")

    def spread(self, name: str) -> float | None:
        """Standard deviation over seeds, pooled over the variants that have several."""
        return pooled_deviation([self.values(variant, name) for variant in self.rows])

    def compare(self, first: str, second: str, name: str = "validation_loss") -> Comparison:
        """Compare two variants' means; the error is from the spread over seeds."""
        groups = (self.values(variant, name) for variant in (first, second))
        return compared(*groups, self.spread(name))


def _thin(values: np.ndarray) -> list[float]:
    """Means of neighboring values, as many as a curve needs."""
    parts = np.array_split(values, min(len(values), CURVE_POINTS))
    return [float(part.mean()) for part in parts]


def _rounded(value: Any) -> Any:
    """Five digits: more would be noise, and would fill the repository."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}")
    return value


def _lines(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)
