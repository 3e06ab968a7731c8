"""Writes ``summary.json`` and ``curves.png`` of a run from its event files.

It reads the values that :mod:`megatron_dynmoe.runs.metrics` and Megatron wrote to TensorBoard, so
it also serves runs that were cut off or resumed.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_dynmoe.runs.folder import (
    CURVES,
    EVENT_FILES,
    RESOLVED,
    SUMMARY,
    TENSORBOARD,
    has_events,
)
from megatron_dynmoe.settings.command_line import UsageError
from megatron_dynmoe.settings.schedule import TargetSchedule
from megatron_dynmoe.storage.atomic import replace_file

LOSS = "lm loss"
TARGET = "dynmoe/target_experts_per_token"

# The summary averages the routing over this share of the steps, at the end of the run.
TAIL = 0.2
# A heat map has at most this many columns: an eye cannot tell more apart.
MAX_COLUMNS = 240


class NothingLogged(ValueError):
    """The run has not logged a step yet."""


class Series(NamedTuple):
    """One scalar over a run: iterations and values, and wall-clock times in seconds."""

    iterations: list[int]
    values: list[float]
    times: list[float]


def read_scalars(run_dir: Path, elsewhere: Path | None = None) -> dict[str, Series]:
    """Read all scalars of a run, as the last of its starts left them.

    If a run resumes from a checkpoint before its last step, it makes void whatever was logged
    after that checkpoint.

    Args:
        run_dir: the folder given as ``--run-dir``.
        elsewhere: the folder of the events (``--tensorboard-dir``), if it is another.

    Raises:
        NothingLogged: there are no event files.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_dir / TENSORBOARD
    if elsewhere is not None and not has_events(folder):
        folder = elsewhere
    if not has_events(folder):
        raise NothingLogged(
            f"{folder} holds no event files: give the folder of a run that was started with "
            "--run-dir and has logged a step."
        )
    files = [
        EventAccumulator(str(path), size_guidance={"scalars": 0})
        for path in folder.glob(EVENT_FILES)
    ]
    for file in files:
        file.Reload()
    # A start that is killed at once leaves an empty file, or one without a scalar.
    files = [file for file in files if file.Tags()["scalars"]]
    # This is the order of the starts. TensorBoard sorts by name, which cannot order the files of
    # one second.
    files.sort(key=EventAccumulator.FirstEventTimestamp)
    by_tag: dict[str, list[Any]] = {}
    for file in files:
        for tag in file.Tags()["scalars"]:
            by_tag.setdefault(tag, []).extend(file.Scalars(tag))
    trained = [event.wall_time for event in by_tag.get(LOSS, [])]
    scalars = {}
    for tag, events in by_tag.items():
        kept = _drop_undone_steps(events, trained if "validation" in tag else None)
        scalars[tag] = Series(
            [event.step for event in kept],
            [event.value for event in kept],
            [event.wall_time for event in kept],
        )
    return scalars


def _drop_undone_steps(events: list[Any], trained: list[float] | None) -> list[Any]:
    """The events of one scalar without those that a later start trained again.

    Args:
        events: in the order in which they were written.
        trained: only for a scalar of evaluation: the times at which training logged a step. If an
            evaluation goes back, but training logged no step since the one before it, it comes
            from the test set, which Megatron logs under the same name, or from ``--skip-train``;
            it is left out.
    """
    kept: list[Any] = []
    for event in events:
        if kept and event.step <= kept[-1].step and trained is not None:
            steps_before = bisect_right(trained, kept[-1].wall_time)
            if steps_before == bisect_right(trained, event.wall_time):
                continue
        while kept and kept[-1].step >= event.step:
            kept.pop()
        kept.append(event)
    return kept


def write_report(run_dir: Path, wall_seconds: float | None = None) -> dict[str, Any]:
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
    text = json.dumps(summary, indent=2) + "\n"
    replace_file(run_dir / SUMMARY, lambda partial: partial.write_text(text))
    plot_curves(run_dir / CURVES, resolved, scalars)
    return summary


def read_run(run_dir: Path) -> tuple[dict[str, Any], dict[str, Series]]:
    """The resolved settings and the scalars of a run, which may still be under way.

    Raises:
        UsageError: the folder is not a run's.
        NothingLogged: the run has not logged a step yet.
    """
    resolved_file = run_dir / RESOLVED
    if not resolved_file.is_file():
        reason = f"it holds no {RESOLVED}" if run_dir.is_dir() else "there is no such folder"
        raise UsageError(
            f"{run_dir} is not the folder of a run: {reason}. Give the folder that training was "
            "given as --run-dir."
        )
    resolved = yaml.safe_load(resolved_file.read_text())
    named = resolved.get("megatron", {}).get("tensorboard_dir")
    scalars = read_scalars(run_dir, Path(named) if named else None)
    if LOSS not in scalars:
        raise NothingLogged(f"{run_dir} has not logged a step yet: wait for its first log line.")
    return resolved, scalars


def target_of(routing: dict[str, Any], scalars: dict[str, Series]) -> Series | None:
    """The target experts per token as it was at each logged step; None without a target.

    The settings know only the target of the last start. They are used only for runs that logged
    no target, such as those of version 0.1.0.
    """
    if "target_experts_per_token" not in routing:
        return None
    if TARGET in scalars:
        return scalars[TARGET]
    schedule, loss = TargetSchedule.parse(routing["target_experts_per_token"]), scalars[LOSS]
    return loss._replace(values=[schedule.at_step(iteration) for iteration in loss.iterations])


def layers(scalars: dict[str, Series], name: str) -> dict[int, Series]:
    """The series of a quantity by layer number, bottom first; only layers with experts."""
    pattern = re.compile(rf"dynmoe_layers/{name}_layer_(\d+)")
    found = {int(match[1]): scalars[tag] for tag in scalars if (match := pattern.fullmatch(tag))}
    return dict(sorted(found.items()))


def summarize_run(
    resolved: dict[str, Any], scalars: dict[str, Series], wall_seconds: float | None = None
) -> dict[str, Any]:
    """Condense a run into the figures that people compare runs by."""
    routing, megatron = resolved["dynamic_routing"], resolved["megatron"]
    loss = scalars[LOSS]
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
    # This is a median, since an evaluation or a checkpoint follows some steps. It is in tokens,
    # since the batch may grow.
    batches = scalars.get("batch-size")
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


def plot_curves(path: Path, resolved: dict[str, Any], scalars: dict[str, Series]) -> None:
    """Draw loss, experts per token against the target, threshold, and experts by layer.

    The picture appears at once and whole, so one can watch a run that is under way.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    routing = resolved["dynamic_routing"]
    dynamic = routing["routing"] != "top_k"
    shape, size = ((2, 2), (11, 7)) if dynamic else ((1, 1), (5, 3.8))
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    loss_axis, *routing_axes = axes.flat

    loss = scalars[LOSS]
    loss_axis.plot(loss.iterations, loss.values, color="C0", label="training")
    if "lm loss validation" in scalars:
        validation = scalars["lm loss validation"]
        loss_axis.plot(
            validation.iterations, validation.values, "o", color="C3", label="validation"
        )
    loss_axis.set(title="language-model loss", xlabel="iteration", ylabel="nats per token")
    loss_axis.legend(frameon=False)

    if dynamic:
        experts_axis, threshold_axis, layer_axis = routing_axes
        _plot_by_layer(experts_axis, scalars, "experts_per_token")
        target = target_of(routing, scalars)
        if target is not None:
            experts_axis.plot(
                target.iterations,
                target.values,
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
    if dynamic:
        by_layer = layers(scalars, "experts_per_token")
        iterations = next(iter(by_layer.values())).iterations
        draw_layers(layer_axis, iterations, {layer: row.values for layer, row in by_layer.items()})
    save_figure(figure, path, dpi=130)


def draw_layers(
    axis: Any, iterations: Sequence[int], values: Mapping[int, Sequence[float]]
) -> None:
    """Draw a heat map of experts per token: iterations to the right, layers upwards.

    Args:
        axis: a matplotlib axis.
        iterations: the iteration of each column.
        values: layer number -> experts per token at each of these iterations.
    """
    import numpy as np

    numbers = range(1, max(values) + 1)
    map_LT = np.full((len(numbers), len(iterations)), np.nan)
    for layer, row in values.items():
        map_LT[layer - 1] = row
    columns = np.array_split(np.arange(len(iterations)), min(len(iterations), MAX_COLUMNS))
    map_LT = np.stack([map_LT[:, chosen].mean(axis=1) for chosen in columns], axis=1)
    edges = [iterations[0] - 1, *(iterations[chosen[-1]] for chosen in columns)]
    mesh = axis.pcolormesh(edges, np.arange(len(numbers) + 1) + 0.5, map_LT, rasterized=True)
    axis.figure.colorbar(mesh, ax=axis, label="experts per token")
    axis.set(title="experts per token by layer", xlabel="iteration", ylabel="layer")
    axis.grid(False)
    axis.yaxis.get_major_locator().set_params(integer=True)


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Save to a file beside the path and rename it: until then, readers see the old picture."""
    import matplotlib.pyplot as plt

    try:
        replace_file(
            path, lambda partial: figure.savefig(partial, format=path.suffix[1:], **options)
        )
    finally:
        plt.close(figure)


def _plot_by_layer(axis: Any, scalars: dict[str, Series], name: str) -> None:
    for index, series in enumerate(layers(scalars, name).values()):
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
