"""DTop-p, top-k and a fixed threshold in a Diffusion Transformer, at equal mean counts of experts.

    python -m study.diffusion [--only NAME ...] [--seeds N] [--list]

Each run is `examples/diffusion/run.sh`, one process of one thread: training, then measuring. A
finished run is a row in study/results/diffusion.json, and is not trained again.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_dynmoe.runs import metric_names
from megatron_dynmoe.runs.events import read_run
from megatron_dynmoe.settings.messages.command_line import CommandParser, number
from megatron_dynmoe.storage.atomic import replace_file
from study import fingerprint
from study.parts import Rows, of_variant, read_rows
from study.results import RESULTS, errors_in_95, freedom, pooled_deviation
from study.variants import VARIANTS as MAIN
from study.variants import Variant

STEPS, SAMPLES, SEEDS = 400, 50, 3
ROWS = RESULTS / "diffusion.json"
RUNS = fingerprint.ROOT / "runs" / "study-diffusion"
THRESHOLD = 0.146  # of the fixed one: about 2 experts in the mean of a training

FIXED = MAIN["fixed_020"].flags.replace("0.2", f"{THRESHOLD:g}")
VARIANTS = {
    "dtop_p": Variant("dtop_p", "DTop-p, target 2", MAIN["dtop_p"].flags, SEEDS),
    "top2": Variant("top2", "top-2", MAIN["top2"].flags, SEEDS),
    "fixed": Variant("fixed", f"fixed top-p {THRESHOLD:g}", FIXED, SEEDS),
}
# Of a row: its name, the title of its column, and how it is written.
MEASURES = (
    ("training_experts", "experts, training", "{:.2f}"),
    ("held_out_experts", "experts, held-out", "{:.2f}"),
    ("mean_loss", "held-out loss", "{:.4f}"),
    ("recognized", "recognized, %", "{:.1f}"),
    ("frechet", "Fréchet distance", "{:.2f}"),
)
NUM_COUNTS = 2  # of these, which are no results
LEVELS = (0, 2, 4, 6, 8, 9)  # of the noise, in the table
Column = tuple[str, Callable[[dict[str, Any]], float], str]  # title, value of a row, form


def train(name: str, variant: Variant, seed: int, images: str) -> dict[str, Any]:
    """Train and measure one run.

    Returns:
        Its row.
    """
    folder = RUNS / name
    env = {
        "IMAGES": images,
        "NPROC": "1",
        "OMP_NUM_THREADS": "1",
        "ROUTING": variant.flags,
        "RUN": str(folder),
        "SAMPLES": str(SAMPLES),
        "STEPS": str(STEPS),
    }
    at_the_end = ["--eval-interval", str(STEPS), "--save-interval", str(STEPS)]
    subprocess.run(
        ["nice", "-n", "5", "bash", "examples/diffusion/run.sh", "--seed", str(seed), *at_the_end],
        cwd=fingerprint.ROOT,
        env=os.environ | env,
        check=True,
    )
    measured = json.loads((folder / "samples" / f"measured_{STEPS}.json").read_text())
    experts = measured.pop("experts")
    measured.pop("accuracy_by_class")
    _, scalars = read_run(folder)
    counted = scalars.get(metric_names.EXPERTS)
    return measured | {
        "commit": fingerprint.commit(),
        "seed": seed,
        "steps": STEPS,
        "mean_loss": statistics.fmean(measured["loss"]),
        "recognized": 100 * measured.pop("accuracy"),
        # Stock top-k counts nothing: each token has 2.
        "training_experts": statistics.fmean(counted.values) if counted else 2.0,
        "held_out_experts": _mean(experts) if experts else 2.0,
    }


def table(rows: Rows) -> list[str]:
    """The measures by routing, DTop-p against the others, and the loss by noise level."""
    columns = [(title, lambda row, name=name: row[name], form) for name, title, form in MEASURES]
    lines = [*_table("routing", columns, rows), "", *_differences(columns[NUM_COUNTS:], rows)]
    known = next((row["times"] for row in rows.values()), None)
    if known is not None:
        levels = [
            (f"{known[at]:.2f}", lambda row, at=at: row["loss"][at], "{:.4f}") for at in LEVELS
        ]
        lines += ["", *_table("loss at time", levels, rows)]
    return lines


def _table(head: str, columns: list[Column], rows: Rows) -> list[str]:
    """Means of the columns by routing, with their 95 % intervals."""
    titles = [title for title, *_ in columns]
    lines = [f"| {head} | seeds | {' | '.join(titles)} |", "| --- " * (2 + len(titles)) + "|"]
    of = {name: of_variant(rows, name) for name in VARIANTS}
    for name, variant in VARIANTS.items():
        cells = [variant.title, str(len(of[name]))]
        for _, value, form in columns:
            groups = [[value(row) for row in found] for found in of.values()]
            cells.append(_cell([value(row) for row in of[name]], _error(groups), form))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _differences(columns: list[Column], rows: Rows) -> list[str]:
    """DTop-p less each other routing, with 95 % intervals."""
    ours, *others = VARIANTS
    lines = [
        f"| {VARIANTS[ours].title}, less | {' | '.join(title for title, *_ in columns)} |",
        "| --- " * (1 + len(columns)) + "|",
    ]
    for name in others:
        cells = [VARIANTS[name].title]
        for _, value, form in columns:
            of = {known: [value(row) for row in of_variant(rows, known)] for known in VARIANTS}
            error = _error(list(of.values()))
            cells.append(_difference(of[ours], of[name], error, form.replace(":", ":+")))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _difference(first: list[float], second: list[float], error: float | None, form: str) -> str:
    if not first or not second:
        return "-"
    difference = statistics.fmean(first) - statistics.fmean(second)
    if error is None:
        return form.format(difference)
    half = error * (1 / len(first) + 1 / len(second)) ** 0.5
    ends = (form.format(difference + sign * half) for sign in (-1, 1))
    return f"{form.format(difference)} ({' to '.join(ends)})"


def _error(groups: list[list[float]]) -> float | None:
    """Half of the 95 % interval of a single run; None before two seeds of a routing differ.

    A group that is always the same, such as top-2's counts, says nothing of the others.
    """
    groups = [values for values in groups if len(set(values)) > 1]
    noise = pooled_deviation(groups)
    return None if noise is None else errors_in_95(freedom(groups)) * noise


def _cell(values: list[float], error: float | None, form: str) -> str:
    if not values:
        return "-"
    mean = form.format(statistics.fmean(values))
    if error is None or (len(values) > 1 and len(set(values)) == 1):
        return mean
    return f"{mean} ± {form.format(error / len(values) ** 0.5)}"


def _mean(nested: Any) -> float:
    return statistics.fmean(map(_mean, nested)) if isinstance(nested, list) else nested


def main(argv: Sequence[str] | None = None) -> None:
    """Train what has no row, seed by seed, and print the tables."""
    parser = CommandParser(prog="python -m study.diffusion", description=__doc__)
    add = parser.add_argument
    add("--images", default="/usr/share/datasets/fashion-mnist", help="see docs/diffusion.md")
    add("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    add("--seeds", type=number(int, 1), default=SEEDS, metavar="N", help="at most so many of each")
    add("--list", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    rows = read_rows(ROWS)
    planned = [
        (name, seed) for seed in range(1, args.seeds + 1) for name in dict.fromkeys(args.only)
    ]
    for variant, seed in planned:
        name = f"{variant}-seed{seed}"
        if args.list or name in rows:
            print(f"{name:<16} {'in the results' if name in rows else 'waits'}", flush=True)
            continue
        print(f"{name:<16} trains", flush=True)
        try:
            row = train(name, VARIANTS[variant], seed, args.images)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)  # the script has said why
        rows = read_rows(ROWS) | {name: row}
        kept = json.dumps(rows, indent=1, sort_keys=True) + "\n"
        replace_file(ROWS, lambda partial, kept=kept: Path(partial).write_text(kept))
    if not args.list:
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
