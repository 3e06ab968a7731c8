"""Writes what is left of a run at its end: ``summary.json``, and ``curves.png`` beside it."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_dynmoe.runs import metric_names as names
from megatron_dynmoe.runs.drawing.curves import plot_curves
from megatron_dynmoe.runs.events import Series, read_run
from megatron_dynmoe.runs.folder import CURVES, SUMMARY
from megatron_dynmoe.storage.atomic import replace_file
from megatron_dynmoe.storage.json_files import measured_json

# The summary averages the routing over this share of the steps, at the end of the run.
TAIL = 0.2


def write_summary_and_curves(run_dir: Path, wall_seconds: float | None = None) -> dict[str, Any]:
    """Write ``summary.json`` and ``curves.png`` into a run's folder.

    Args:
        run_dir: the folder given as ``--run-dir``.
        wall_seconds: duration of the whole run; if None, the time from first to last event.

    Returns:
        The summary.

    Raises:
        ValueError: the folder is not a run's.
    """
    resolved, scalars = read_run(run_dir)
    summary = summarize_run(resolved, scalars, wall_seconds)
    text = measured_json(summary)
    replace_file(run_dir / SUMMARY, lambda partial: partial.write_text(text))
    plot_curves(run_dir / CURVES, resolved, scalars)
    return summary


def summarize_run(
    resolved: dict[str, Any], scalars: dict[str, Series], wall_seconds: float | None = None
) -> dict[str, Any]:
    """Condense a run into the figures that people compare runs by."""
    routing, megatron = resolved["dynamic_routing"], resolved["megatron"]
    loss = scalars[names.LOSS]
    if wall_seconds is None:
        wall_seconds = loss.times[-1] - loss.times[0]
    if routing["routing"] == "top_k":
        mean = float(megatron["moe_router_topk"]) if megatron["num_experts"] else None
        std: float | None = 0.0 if megatron["num_experts"] else None
    else:
        mean = _mean(_tail(scalars[names.EXPERTS]))
        std = _mean(_tail(scalars[names.STD_EXPERTS]))
    validation = scalars.get(names.VALIDATION_LOSS)
    threshold = scalars.get(names.THRESHOLD)
    # This is a median, since an evaluation or a checkpoint follows some steps. It is in tokens,
    # since the batch may grow.
    batches = scalars.get(names.BATCH_SIZE)
    batch_at = dict(zip(batches.iterations, batches.values, strict=True)) if batches else {}
    rates = [
        batch_at.get(i1, megatron["global_batch_size"]) * (i1 - i0) / (t1 - t0)
        for (i0, t0), (i1, t1) in pairwise(zip(loss.iterations, loss.times, strict=True))
        if t1 > t0
    ]
    return {
        "routing": routing["routing"],
        "target_experts_per_token": _number(routing.get("target_experts_per_token")),
        "mean_experts_per_token": mean,
        "std_experts_per_token": std,
        "final_threshold": threshold.values[-1] if threshold else None,
        "first_loss": loss.values[0],
        "last_loss": loss.values[-1],
        "validation_loss": validation.values[-1] if validation else None,
        "iterations": loss.iterations[-1],
        "tokens_per_second": statistics.median(rates) * megatron["seq_length"] if rates else None,
        "wall_seconds": wall_seconds,
    }


def _tail(series: Series) -> list[float]:
    return series.values[-max(1, math.ceil(len(series.values) * TAIL)) :]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
