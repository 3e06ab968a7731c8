"""What the papers set otherwise: DTop-p's losses, and Dynamic MoE's threshold.

    python -m study.settings [--only NAME ...] [--seeds N] [--list] [--quick]

DTop-p's authors take a balance loss of 1e-4 and a dynamic loss of 1e-3, and no z-loss, since it
flattens the logits and drives the threshold down. Here the coefficients change one at a time, and
the z-loss is on the logits before their normalization. The threshold is that of the last step; the
load is that of the busiest expert over the mean expert, in the worst layer and over the last fifth
of the training. Dynamic MoE compares thresholds, also of a trained top-2 model, and leaves out its
dynamic loss (its Tables 7 and 8: experts per token, and the average score of five tasks). Of its
models only that of 0.5 is trained here; the others are the main study's.
"""

from __future__ import annotations

import statistics
from typing import Any

from megatron_dynmoe.runs import metric_names
from megatron_dynmoe.runs.events import read_run
from study import corpus, runs
from study.parts import (
    EXPERTS,
    LOSS,
    Part,
    Rows,
    cells,
    end,
    held_out,
    joined,
    losses,
    mean,
    more_than,
    noise,
    of_variant,
)  # fmt: skip
from study.results import Noise, Results, paired, tail
from study.variants import SEEDS, Variant, dtop_p
from study.variants import VARIANTS as MAIN

REFERENCE, TOP_2 = "dtop_p", "top2"
THRESHOLD, LOAD = "threshold", "busiest_load"


def _losses(name: str, title: str, flags: str) -> Variant:
    # Of a flag that is given twice the last one counts.
    return Variant(name, title, dtop_p() + flags)


COEFFICIENTS = {
    variant.name: variant
    for variant in (
        # The run of `PART=rules`, for what its row does not hold.
        Variant(REFERENCE, "balance 1e-2, dynamic 1e-3, no z-loss", MAIN[REFERENCE].flags),
        _losses("balance_1e4", "balance 1e-4", "--moe-dynamic-balance-loss-coeff 1e-4"),
        _losses("balance_1e3", "balance 1e-3", "--moe-dynamic-balance-loss-coeff 1e-3"),
        _losses("balance_1e1", "balance 1e-1", "--moe-dynamic-balance-loss-coeff 1e-1"),
        _losses("dynamic_0", "no dynamic loss", "--moe-dynamic-dynamic-loss-coeff 0"),
        _losses("dynamic_1e4", "dynamic 1e-4", "--moe-dynamic-dynamic-loss-coeff 1e-4"),
        _losses("dynamic_1e2", "dynamic 1e-2", "--moe-dynamic-dynamic-loss-coeff 1e-2"),
        _losses("z_1e3", "z-loss 1e-3", "--moe-z-loss-coeff 1e-3"),
        _losses("z_1e2", "z-loss 1e-2", "--moe-z-loss-coeff 1e-2"),
    )
}
P_05 = Variant(
    "top_p_05",
    "top-p 0.5 with dynamic loss",
    "--moe-dynamic-routing top_p --moe-dynamic-threshold 0.5",
    SEEDS,
)
# Of Dynamic MoE's Tables 7 and 8: a model, its experts and its average over five tasks. Table 8
# gives 42.8 to the model of the first line.
TRAINED = (
    ("top_p_04", "p = 0.4", "1.8", "42.3"),
    (P_05.name, "p = 0.5", "2.3", "42.8"),
    ("top_p_04_no_dynamic_loss", "p = 0.4, no dynamic loss", "2.0", "40.0"),
    ("top1", "top-1", "1.0", "40.5"),
    (TOP_2, "top-2", "2.0", "41.6"),
)
AFTERWARDS = (
    (0.1, "1.1", "40.0"),
    (0.2, "1.9", "40.3"),
    (0.3, "2.8", "42.1"),
    (0.4, "3.9", "42.8"),
)


def table(rows: Rows, of_main: Results | None = None) -> list[str]:
    """DTop-p by its losses, and Dynamic MoE's Tables 7 and 8 beside this study's, in Markdown.

    Args:
        of_main: results of the main study, which trains the other models of those tables.
    """
    found = losses(rows)
    known = noise(found, of_main)
    lines = [
        "| losses of DTop-p | seeds | held-out loss | experts per token | threshold | load "
        "| more than the first, 95 % | |",
        "| --- " * 8 + "|",
    ]
    for name, variant in COEFFICIENTS.items():
        if name not in found:
            continue
        of_model = of_variant(rows, name)
        row = [
            *(variant.title, *cells(of_model)),
            *(mean(of_model, THRESHOLD, ".3f"), mean(of_model, LOAD, ".2f")),
            *more_than(REFERENCE, name, found, known),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, "", *_of_dynamic_moe(rows, of_main, known)]


def _of_dynamic_moe(rows: Rows, of_main: Results | None, known: Noise | None) -> list[str]:
    lines = [
        "| Tables 7 and 8 | their experts | score | seeds here | experts | held-out loss "
        "| more than top-2, 95 % | |",
        "| --- " * 8 + "|",
    ]
    if of_main is not None:
        trained_there = {
            f"{row['variant']}-seed{row['seed']}": row for row in of_main.content["runs"]
        }
        rows = joined(trained_there, rows)
    found = losses(rows)
    for name, title, experts, score in TRAINED:
        of_model = of_variant(rows, name)
        row = [
            *(title, experts, score, str(len(of_model))),
            *(mean(of_model, EXPERTS, ".2f"), mean(of_model, LOSS, ".4f")),
            *more_than(TOP_2, name, found, known),
        ]
        lines.append(f"| {' | '.join(row)} |")
    swept = [] if of_main is None else of_main.content["post_hoc"]
    own = [point["loss"] for point in swept if point["threshold"] is None]
    for threshold, experts, score in AFTERWARDS:
        points = [point for point in swept if point["threshold"] == threshold]
        after = [point["loss"] for point in points]
        more = paired(after, own, by_student=True) if points else None
        row = [
            *(f"top-2, p = {threshold:g} after training", experts, score, str(len(points))),
            *(mean(points, "experts", ".2f"), mean(points, "loss", ".4f")),
            *(("-", "") if more is None else (more.interval, more.verdict("better", "worse"))),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _measure(run: runs.Run, text: corpus.Corpus) -> dict[str, Any]:
    _, scalars = read_run(run.folder)
    return held_out(run, text) | {
        THRESHOLD: scalars[metric_names.THRESHOLD].values[-1],
        LOAD: statistics.fmean(tail(scalars[metric_names.MAX_OVER_MEAN_LOAD].values)),
    }


VARIANTS = COEFFICIENTS | {P_05.name: P_05}
PART = Part("settings", __doc__, VARIANTS, _measure, table, beside="rules")

if __name__ == "__main__":
    end(PART)
