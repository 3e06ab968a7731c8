"""One model for every budget: what it costs beside models of one budget each.

    python -m study.budgets [--only NAME ...] [--list] [--quick]

Three ways to a model that uses b experts per token, on the study's text and with its model:
`elastic` is trained at targets drawn from 1 to 4 and asked for b, with the map of its controller;
`at_2` is trained at 2, and its threshold calibrated for b after the training; `at_1` to `at_4` are
trained at b. The parts can be trained one by one, on any day: each finished run adds its row to
study/results/budgets.json, and the table is printed from all rows that are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dynmoe.settings.messages.command_line import CommandParser
from megatron_dynmoe.storage.atomic import replace_file
from study import corpus, document, fingerprint, runs
from study.queue import Queue, alone
from study.variants import SEEDS, SIZES, Variant

BUDGETS = (1.0, 1.5, 2.0, 3.0, 4.0)
RESULTS = document.RESULTS / "budgets.json"
_FLAGS = (
    "--moe-dynamic-routing dtop_p --moe-dynamic-balance-loss-coeff 1e-2 "
    "--moe-dynamic-target-experts-per-token "
)
ELASTIC, AFTERWARDS = "elastic", "at_2"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(ELASTIC, "targets drawn from 1 to 4", _FLAGS + "uniform(1,4)", SEEDS),
        Variant(AFTERWARDS, "target 2", _FLAGS + "2", SEEDS),
        *(
            Variant(f"at_{budget:g}", f"target {budget:g}", f"{_FLAGS}{budget:g}")
            for budget in BUDGETS
            if budget != 2
        ),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not finished, measure it, and print the table; returns the exit code."""
    args = _parser().parse_args(argv)
    size = SIZES["quick" if args.quick else "cpu"]
    folder = args.runs or runs.default_folder(args.quick)
    files = corpus.files_of(None)
    text = corpus.corpus_of(files, size.vocab_size, folder)
    planned = runs.plan(
        size,
        text,
        fingerprint.of_code(),
        folder,
        only=args.only,
        num_seeds=1 if args.quick else args.seeds,
        variants=VARIANTS,
    )
    results = folder / RESULTS.name if args.quick else RESULTS
    rows = json.loads(results.read_text()) if results.is_file() else {}
    if args.list:
        for run in planned:
            done = "in the results" if run.name in rows else f"{run.iteration} of {size.steps}"
            print(f"{run.name:<16} {done:<16} {run.variant.title}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        corpus.prepare(text, files, size.vocab_size, size.sequence_length)
        queue = Queue([run for run in planned if run.name not in rows], text, size, args.jobs)
        queue.train()
        for run in planned:
            if run.is_finished and run.name not in rows:
                rows[run.name] = {"commit": run.commit, "points": _points(run, text)}
                kept = json.dumps(rows, indent=2, sort_keys=True) + "\n"
                replace_file(results, lambda partial, kept=kept: partial.write_text(kept))
    print("\n".join(table(rows)))
    for failure in queue.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if queue.stopped_by is not None:
        return 128 + queue.stopped_by
    return 1 if queue.failures else 0


def table(rows: dict[str, Any]) -> list[str]:
    """Held-out losses by budget, in Markdown: means over the seeds that are there."""
    lines = ["| experts per token | elastic | trained at 2, calibrated | trained at it |"]
    lines.append("| --- | --- | --- | --- |")
    for budget in BUDGETS:
        cells = [f"{budget:g}"]
        for name in (ELASTIC, AFTERWARDS, f"at_{budget:g}"):
            points = [
                point
                for run, row in sorted(rows.items())
                for point in row["points"]
                if run.rpartition("-seed")[0] == name and point["budget"] == budget
            ]
            cells.append(_cell(points))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(points: list[dict[str, float]]) -> str:
    if not points:
        return "-"
    losses = [point["loss"] for point in points]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    experts = statistics.fmean(point["experts"] for point in points)
    return f"{statistics.fmean(losses):.4f}{spread} ({experts:.2f} used)"


def _points(run: runs.Run, text: corpus.Corpus) -> list[dict[str, float]]:
    """Loss and experts of a model on the held-out text, at each budget that it serves."""
    from megatron_dynmoe.use import calibrate as calibration  # these import PyTorch
    from study import afterwards

    print(f"{run.name}: held-out text", flush=True)
    model, tokens_NS = afterwards.load_run(run, text)
    config = model.config

    def point(budget: float, found: calibration.Measurement, threshold: float) -> dict[str, float]:
        return {
            "budget": budget,
            "threshold": threshold,
            "experts": found.experts,
            "loss": found.loss,
        }

    def measure(threshold: calibration.Threshold, label: str) -> calibration.Measurement:
        calibration.set_threshold(config, threshold)
        return calibration.measure(model, tokens_NS, afterwards.BATCH, label)

    own = calibration.measure(model, tokens_NS, afterwards.BATCH)
    if run.variant.name == ELASTIC:
        targets, thresholds = zip(
            *((one["experts_per_token"], one["threshold"]) for one in config.budget_curve),
            strict=True,
        )
        wanted = [(budget, float(np.interp(budget, targets, thresholds))) for budget in BUDGETS]
        return [point(budget, measure(at, f"{budget:g}"), at) for budget, at in wanted]
    trained_at = float(run.variant.name.removeprefix("at_"))
    points = [point(trained_at, own, float(config.threshold[0]))]
    if run.variant.name != AFTERWARDS:
        return points
    for budget in BUDGETS:
        if budget != trained_at:
            sparse = [kind == "sparse" for kind in config.mlp_layer_types]
            found = calibration.calibrate(measure, own, budget, sparse=sparse)
            assert isinstance(found.threshold, float)
            points.append(point(budget, found.measurement, found.threshold))
    return points


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m study.budgets", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="NAME", help=f"parts: {', '.join(VARIANTS)}")
    add("--seeds", type=int, metavar="N", help="at most so many seeds of each (default: all)")
    add("--list", action="store_true", help="show the parts and how far they are")
    add("--quick", action="store_true", help="a tiny model, to see whether everything works")
    add("--jobs", type=int, default=2, metavar="N", help="trainings side by side")
    add("--runs", type=Path, metavar="DIR", help="folder of the runs (default: runs/study)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"study: error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"study: error: {Path(error.cmd[1]).name} failed")
