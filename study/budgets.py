"""One model for every budget: what it costs beside models of one budget each.

    python -m study.budgets [--only NAME ...] [--list] [--quick]

Three ways to a model that uses b experts per token, on the study's text and with its model:
`elastic` is trained at targets drawn from 1 to 4 and asked for b, with the map of its controller;
`at_2` is trained at 2, and its threshold calibrated for b after the training; `at_1` to `at_4` are
trained at b.
"""

from __future__ import annotations

import statistics
from typing import Any

from study import corpus, runs
from study.parts import Part, Rows, end, of_variant
from study.results import Results
from study.variants import SEEDS, Variant, dtop_p

BUDGETS = (1.0, 1.5, 2.0, 3.0, 4.0)
ELASTIC, AFTERWARDS = "elastic", "at_2"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            *(ELASTIC, "targets drawn from 1 to 4"),
            # The last one of a flag counts.
            dtop_p() + "--moe-dynamic-target-experts-per-token uniform(1,4)",
            SEEDS,
        ),
        Variant(AFTERWARDS, "target 2", dtop_p(2), SEEDS),
        *(
            Variant(f"at_{budget:g}", f"target {budget:g}", dtop_p(budget))
            for budget in BUDGETS
            if budget != 2
        ),
    )
}

# To a model that uses so many experts, each with the variant that serves all budgets, if one does.
WAYS = {
    "trained at targets from 1 to 4": ELASTIC,
    "trained at 2, calibrated": AFTERWARDS,
    "trained at it": None,
}


def table(rows: Rows, of_main: Results | None = None) -> list[str]:
    """Held-out losses by budget, in Markdown: means over the seeds that are there."""
    del of_main  # its models have no budgets
    lines = [f"| experts per token | {' | '.join(WAYS)} |", "|" + " --- |" * (len(WAYS) + 1)]
    for budget in BUDGETS:
        cells = [_cell(points_at(rows, way, budget)) for way in WAYS]
        lines.append(f"| {budget:g} | {' | '.join(cells)} |")
    return lines


def points_at(rows: Rows, way: str, budget: float) -> list[dict[str, float]]:
    """Budget, threshold, experts and loss of each seed of one of the ``WAYS``."""
    return [
        point
        for row in of_variant(rows, WAYS[way] or f"at_{budget:g}")
        for point in row["points"]
        if point["budget"] == budget
    ]


def _cell(points: list[dict[str, float]]) -> str:
    if not points:
        return "-"
    losses = [point["loss"] for point in points]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    experts = statistics.fmean(point["experts"] for point in points)
    return f"{statistics.fmean(losses):.4f}{spread} ({experts:.2f} used)"


def _points(run: runs.Run, text: corpus.Corpus) -> list[dict[str, float]]:
    """Loss and experts of a model on the held-out text, at each budget that it serves."""
    from megatron_dynmoe.huggingface.budgets_dynmoe import threshold_at  # these import PyTorch
    from megatron_dynmoe.use import calibrate as calibration
    from study import afterwards

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

    if run.variant.name == ELASTIC:
        wanted = [(budget, threshold_at(config.budget_curve, budget)) for budget in BUDGETS]
        return [point(budget, measure(at, f"{budget:g}"), at) for budget, at in wanted]
    own = calibration.measure(model, tokens_NS, afterwards.BATCH)
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


def _measure(run: runs.Run, text: corpus.Corpus) -> dict[str, Any]:
    return {"points": _points(run, text)}


PART = Part("budgets", __doc__, VARIANTS, _measure, table)

if __name__ == "__main__":
    end(PART)
