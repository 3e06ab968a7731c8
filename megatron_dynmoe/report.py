"""What a run leaves for its reader: ``summary.json`` and ``curves.png``, from its event files.

Reads what :mod:`megatron_dynmoe.metrics` and Megatron wrote to TensorBoard, so that it also serves
runs that were cut off or resumed.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_dynmoe.schedule import TargetSchedule

TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
RESOLVED = "resolved.yaml"
SUMMARY = "summary.json"
CURVES = "curves.png"

# The share of steps at the end of a run over which the summary averages the routing.
TAIL = 0.2


class Series(NamedTuple):
    """One scalar over a run: iterations and values, and wall-clock times in seconds."""

    iterations: list[int]
    values: list[float]
    times: list[float]


def read_scalars(run_dir: Path) -> dict[str, Series]:
    """Read all scalars of a run; where a resumed run repeats an iteration the later value counts.

    Raises:
        ValueError: the folder holds no event files.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_dir / TENSORBOARD
    if not any(folder.glob("events.out.tfevents.*")):
        raise ValueError(
            f"{folder} holds no event files: give the folder of a run that was started with "
            "--run-dir and has logged a step."
        )
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    scalars = {}
    for tag in accumulator.Tags()["scalars"]:
        last = {}
        for event in accumulator.Scalars(tag):
            # Megatron writes the test loss, too, under the name of the validation loss.
            if tag.endswith("validation") and event.step in last:
                continue
            last[event.step] = event
        events = [last[step] for step in sorted(last)]
        scalars[tag] = Series(
            [event.step for event in events],
            [event.value for event in events],
            [event.wall_time for event in events],
        )
    return scalars


def write_report(run_dir: Path, wall_seconds: float | None = None) -> dict[str, Any]:
    """Write ``summary.json`` and ``curves.png`` into a run's folder.

    Args:
        run_dir: the folder given as ``--run-dir``.
        wall_seconds: duration of the whole run; from the first to the last event if None.

    Returns:
        The summary.

    Raises:
        ValueError: the folder is not that of a run.
    """
    resolved_file = run_dir / RESOLVED
    if not resolved_file.is_file():
        raise ValueError(f"{run_dir} holds no {RESOLVED}: it is not the folder of a run.")
    resolved = yaml.safe_load(resolved_file.read_text())
    scalars = read_scalars(run_dir)
    summary = summarize_run(resolved, scalars, wall_seconds)
    temporary = run_dir / (SUMMARY + ".partial")
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.replace(run_dir / SUMMARY)
    plot_curves(run_dir / CURVES, resolved, scalars)
    return summary


def summarize_run(
    resolved: dict[str, Any], scalars: dict[str, Series], wall_seconds: float | None = None
) -> dict[str, Any]:
    """Condense a run into the figures people compare runs by."""
    routing, megatron = resolved["dynamic_routing"], resolved["megatron"]
    loss = scalars["lm loss"]
    if wall_seconds is None:
        wall_seconds = loss.times[-1] - loss.times[0]
    if routing["routing"] == "top_k":
        mean = float(megatron["moe_router_topk"]) if megatron["num_experts"] else None
        std: float | None = 0.0 if megatron["num_experts"] else None
    else:
        mean = _mean(_tail(scalars["dynmoe/experts_per_token"]))
        std = _mean(_tail(scalars["dynmoe/std_experts_per_token"]))
    validation = scalars.get("lm loss validation")
    threshold = scalars.get("dynmoe/threshold")
    # The median, since some steps are followed by an evaluation or a checkpoint.
    steps = list(pairwise(zip(loss.iterations, loss.times, strict=True)))
    step_seconds = statistics.median(
        (t1 - t0) / (i1 - i0) for (i0, t0), (i1, t1) in steps or [((0, 0), (1, 0))]
    )
    tokens_per_step = megatron["global_batch_size"] * megatron["seq_length"]
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
        "tokens_per_second": tokens_per_step / step_seconds if step_seconds else None,
        "wall_seconds": wall_seconds,
    }


def plot_curves(path: Path, resolved: dict[str, Any], scalars: dict[str, Series]) -> None:
    """Draw loss, experts per token against the target, and threshold, over iterations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    routing = resolved["dynamic_routing"]
    dynamic = routing["routing"] != "top_k"
    figure, axes = plt.subplots(
        1, 3 if dynamic else 1, figsize=(13 if dynamic else 5, 3.8), layout="constrained"
    )
    loss_axis, *routing_axes = axes if dynamic else [axes]

    loss = scalars["lm loss"]
    loss_axis.plot(loss.iterations, loss.values, color="C0", label="training")
    if "lm loss validation" in scalars:
        validation = scalars["lm loss validation"]
        loss_axis.plot(
            validation.iterations, validation.values, "o", color="C3", label="validation"
        )
    loss_axis.set(title="language-model loss", xlabel="iteration", ylabel="nats per token")
    loss_axis.legend(frameon=False)

    if dynamic:
        experts_axis, threshold_axis = routing_axes
        _plot_by_layer(experts_axis, scalars, "experts_per_token")
        if "target_experts_per_token" in routing:
            target = TargetSchedule.parse(routing["target_experts_per_token"])
            iterations = scalars["dynmoe/experts_per_token"].iterations
            experts_axis.plot(
                iterations,
                [target.at(iteration - 1) for iteration in iterations],
                color="black",
                linestyle="--",
                linewidth=1,
                label="target",
            )
        experts_axis.set(title="experts per token", xlabel="iteration")
        experts_axis.legend(frameon=False)
        _plot_by_layer(threshold_axis, scalars, "threshold")
        threshold_axis.set(title="threshold", xlabel="iteration", ylabel="cumulative probability")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_by_layer(axis: Any, scalars: dict[str, Series], name: str) -> None:
    pattern = re.compile(rf"dynmoe_layers/{name}_layer_\d+")
    layers = [series for tag, series in scalars.items() if pattern.fullmatch(tag)]
    for index, series in enumerate(layers):
        axis.plot(
            series.iterations,
            series.values,
            color="C0",
            alpha=0.3,
            linewidth=0.6,
            label="each layer" if index == 0 else None,
        )
    overall = scalars[f"dynmoe/{name}"]
    axis.plot(overall.iterations, overall.values, color="C0", label="all layers")


def _tail(series: Series) -> list[float]:
    return series.values[-max(1, math.ceil(len(series.values) * TAIL)) :]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
