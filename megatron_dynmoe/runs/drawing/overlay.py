"""Draws several runs in one picture: loss against tokens and against measured compute.

It reads the folders that ``--run-dir`` made, including those of runs under way, of stock top-k and
of dense models. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dynmoe.runs import metric_names as names
from megatron_dynmoe.runs.drawing.curves import save_figure
from megatron_dynmoe.runs.events import Series, read_run, target_of
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.messages.outputs import check_parent
from megatron_dynmoe.settings.upstream_flags import layers_with_experts

SUFFIXES = (".png", ".svg", ".pdf")
SMOOTHED = 0.02  # the share of a run over which its training loss is averaged

Values = NDArray[np.float64]


class Run(NamedTuple):
    """The curves of one run; unless they say otherwise, arrays have an entry per logged step."""

    label: str
    tokens: Values  # tokens trained on so far
    expert_flops: Values  # FLOPs spent so far in experts, or in a dense model's MLPs
    loss: Values
    validation: tuple[Values, Values, Values]  # tokens, expert FLOPs and loss of each evaluation
    experts: Values | None  # per token; None for a dense model
    target: Values | None
    threshold: Values | None  # mean over layers; None if the run has no threshold


def read(run_dir: Path, label: str) -> Run:
    """Read a run's folder.

    Raises:
        UsageError: the folder is not a run's.
        ValueError: the run has logged nothing, or its routing is missing.
    """
    resolved, scalars = read_run(run_dir)
    megatron, routing = resolved["megatron"], resolved["dynamic_routing"]
    loss = scalars[names.LOSS]
    iterations = np.array(loss.iterations)
    dynamic = routing["routing"] != "top_k"
    if dynamic and names.EXPERTS not in scalars:
        raise ValueError(
            f"{run_dir} was trained with {routing['routing']}, but its events hold no experts per "
            "token: they were not written by this package, or were cut off."
        )

    # 1. Tokens: between two logged steps, the batch size is that of the later one.
    batch = _at(iterations, scalars.get(names.BATCH_SIZE), megatron["global_batch_size"])
    steps = np.diff(iterations, prepend=0)
    tokens_of_step = steps * batch * megatron["seq_length"]
    tokens = np.cumsum(tokens_of_step)

    # 2. Experts, and the floating-point operations in them, forward and backward
    experts = None
    if dynamic:
        experts = _at(iterations, scalars[names.EXPERTS], np.nan)
    elif megatron["num_experts"]:
        experts = np.full(len(iterations), float(megatron["moe_router_topk"]))
    num_layers = megatron["num_layers"]
    if experts is None:
        experts_of_all_layers = num_layers
    else:
        experts_of_all_layers = experts * sum(
            layers_with_experts(megatron["moe_layer_freq"], num_layers)
        )
    flops = np.cumsum(tokens_of_step * _flops_per_expert(megatron) * experts_of_all_layers)

    # 3. All other curves, at the steps at which they were logged
    evaluations = scalars.get(names.VALIDATION_LOSS, Series([], [], []))
    at = np.array(evaluations.iterations)
    target, aimed_at = target_of(routing, scalars), None
    if target is not None:  # unknown (NaN) for the steps before this package resumed the run
        aimed_at = np.interp(iterations, target.iterations, target.values, left=np.nan)
    return Run(
        label,
        tokens,
        flops,
        np.array(loss.values),
        (
            np.interp(at, iterations, tokens),
            np.interp(at, iterations, flops),
            np.array(evaluations.values),
        ),
        experts,
        aimed_at,
        _at(iterations, scalars[names.THRESHOLD], np.nan) if names.THRESHOLD in scalars else None,
    )


def mlp_flops(megatron: Mapping[str, Any], width: float) -> float:
    """FLOPs of one token in an MLP: two per weight forward, four backward.

    Args:
        megatron: Megatron's arguments, of which ``hidden_size`` and ``swiglu`` count.
        width: the hidden size of the MLP.
    """
    return 6.0 * megatron["hidden_size"] * width * (3 if megatron["swiglu"] else 2)


def labels_of(run_dirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart.

    Raises:
        UsageError: two paths name the same folder.
    """
    paths = [path.resolve() for path in run_dirs]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"{path} is given twice: name every run once.")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Draw the runs into a PNG, SVG or PDF file, which appears only once it is complete.

    Raises:
        ValueError: the suffix is another, or the folder does not exist.
    """
    check_output(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    routed = any(run.experts is not None for run in runs)
    figure, axes = plt.subplots(
        2 if routed else 1, 2, figsize=(11, 8 if routed else 4.5), layout="constrained"
    )
    by_tokens, by_compute, *routing_axes = axes.flat
    colors = matplotlib.color_sequences["tab10" if len(runs) <= 10 else "tab20"]
    for number, run in enumerate(runs):
        color = colors[number % len(colors)]
        _draw_loss(by_tokens, run, run.tokens, run.validation[0], color)
        _draw_loss(by_compute, run, run.expert_flops, run.validation[1], color)
        if run.experts is not None:
            experts_axis, threshold_axis = routing_axes
            experts_axis.plot(run.tokens, run.experts, color=color)
            if run.target is not None:
                experts_axis.plot(run.tokens, run.target, color=color, linestyle=":")
            if run.threshold is not None:
                threshold_axis.plot(run.tokens, run.threshold, color=color)
    by_tokens.set(title="loss against tokens", xlabel="tokens")
    by_compute.set(
        title="loss against measured expert compute",
        xlabel="floating-point operations in experts, forward and backward",
    )
    for axis in (by_tokens, by_compute):
        axis.set_ylabel("loss (dots: validation)")
    if routed:
        experts_axis, threshold_axis = routing_axes
        experts_axis.set(title="experts per token (dotted: target)", xlabel="tokens")
        threshold_axis.set(
            title="threshold (top-k has none)", xlabel="tokens", ylabel="cumulative probability"
        )
    for axis in figure.axes:
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.legend(
        *by_tokens.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(runs)),
        frameon=False,
    )
    save_figure(figure, path, dpi=130)


def check_output(path: Path) -> None:
    """Refuse a path that cannot be written, before anything is read.

    Raises:
        UsageError: the suffix is not in :data:`SUFFIXES`, or the folder does not exist.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--output is {path}: end its name in one of {', '.join(SUFFIXES)}.")
    check_parent(path)


def _draw_loss(axis: Any, run: Run, x: Values, validation_x: Values, color: Any) -> None:
    width = max(1, round(SMOOTHED * len(run.loss)))
    if width > 1:
        axis.plot(x, run.loss, color=color, alpha=0.2, linewidth=0.6)
    axis.plot(x, _smooth(run.loss, width), color=color, label=run.label)
    axis.plot(validation_x, run.validation[2], "o", color=color, markersize=4)


def _smooth(values: Values, width: int) -> Values:
    """Means over as many neighbors on either side, so that nothing moves to the right."""
    steps = np.arange(len(values))
    side = np.minimum(width // 2, np.minimum(steps, steps[::-1]))  # fewer at both ends
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[steps + side + 1] - sums[steps - side]) / (2 * side + 1)


def _at(iterations: NDArray[np.int64], series: Series | None, default: float) -> Values:
    """Interpolate a series linearly at other iterations; use the default if there is none."""
    if series is None:
        return np.full(len(iterations), float(default))
    return np.interp(iterations, series.iterations, series.values)


def _flops_per_expert(megatron: dict[str, Any]) -> float:
    """FLOPs of one token in one expert, or in a layer's MLP of a dense model."""
    width = megatron["ffn_hidden_size"]
    if megatron["num_experts"]:
        width = megatron["moe_ffn_hidden_size"] or width
    return mlp_flops(megatron, width)
