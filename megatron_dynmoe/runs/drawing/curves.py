"""Draws the curves of a run: ``curves.png``, and the heat map that TensorBoard shows, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dynmoe.runs import metric_names as names
from megatron_dynmoe.runs.events import Series, layers, target_of
from megatron_dynmoe.storage.atomic import replace_file

# A heat map has at most this many columns: an eye cannot tell more apart.
MAX_COLUMNS = 240


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

    loss = scalars[names.LOSS]
    loss_axis.plot(loss.iterations, loss.values, color="C0", label="training")
    if names.VALIDATION_LOSS in scalars:
        validation = scalars[names.VALIDATION_LOSS]
        loss_axis.plot(
            validation.iterations, validation.values, "o", color="C3", label="validation"
        )
    loss_axis.set(title="loss", xlabel="iteration")
    loss_axis.legend(frameon=False)

    if dynamic:
        experts_axis, threshold_axis, layer_axis = routing_axes
        _plot_by_layer(experts_axis, scalars, names.EXPERTS, names.EXPERTS_OF_LAYER)
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
        if names.THRESHOLD in scalars:
            _plot_by_layer(threshold_axis, scalars, names.THRESHOLD, names.THRESHOLD_OF_LAYER)
        threshold_axis.set(title="what the controller moves", xlabel="iteration")
        if routing.get("routing") in ("top_p", "dtop_p"):
            threshold_axis.set(title="threshold", ylabel="cumulative probability")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    if dynamic:
        by_layer = layers(scalars, names.EXPERTS_OF_LAYER)
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


def _plot_by_layer(axis: Any, scalars: dict[str, Series], name: str, quantity: str) -> None:
    for index, series in enumerate(layers(scalars, quantity).values()):
        axis.plot(
            series.iterations,
            series.values,
            color="C0",
            alpha=0.3,
            linewidth=0.6,
            label="each layer" if index == 0 else None,
        )
    overall = scalars[name]
    axis.plot(overall.iterations, overall.values, color="C0", label="all layers")
