"""Draws the report's figures, each as PNG and as SVG.

Letters of dimensions are those of counts.py.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from megatron_dynmoe.analysis.counting.counts import RoutingCounts, add_up
from megatron_dynmoe.analysis.counting.influences import INFLUENCES
from megatron_dynmoe.analysis.results.statistics import describe_correlation, lift

INK, FAINT = "#1c2733", "#c9d1da"
BLUE, ORANGE = "#3b7dd8", "#e0732c"
# Blue below 1, orange above; 1 is the background.
RATIOS = LinearSegmentedColormap.from_list(
    "ratios",
    [(0, (BLUE, 1.0)), (0.5, (BLUE, 0.0)), (0.5, (ORANGE, 0.0)), (1, (ORANGE, 1.0))],
)
STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron-dynmoe",
}
# More small pictures of layers than this would be unreadable, so some layers stand for all.
MAX_PANELS = 12
# Letters beside a figure, and over one of two panels
LONGEST_NAME, LONGEST_TITLE = 24, 16
KEY = "experts_per_token"
INFLUENCE_TITLES = {
    "own_loss": "its own loss",
    "next_loss": "the next loss",
    "entropy": "entropy",
    "frequency": "frequency",
    "position": "position",
    "word_start": "word start",
}


class Drawn(NamedTuple):
    """A figure in the page."""

    title: str
    alt: str  # what it shows, with its main numbers, for people who cannot see it
    svg: bytes


def draw_all(
    content: dict[str, Any], groups: dict[str, RoutingCounts], folder: Path
) -> dict[str, Drawn]:
    """Draw every figure that has something to show, and save it under its name."""
    total = add_up(groups)
    statistics = content["statistics"]
    figures: dict[str, Callable[[], tuple[Figure, str, str]] | None] = {
        "layers": lambda: _layers(statistics),
        "distribution": lambda: _distribution(statistics, total),
        "groups": (lambda: _groups(statistics)) if len(groups) > 1 else None,
        "loss": lambda: _loss(statistics),
        "influences": (lambda: _influences(statistics)) if _has_influences(statistics) else None,
        "positions": lambda: _positions(statistics),
        "sweep": (lambda: _sweep(content["sweep"])) if content["sweep"] else None,
        "budgets": (
            (lambda: _budgets(content["model"]["budget_curve"]))
            if content["model"].get("budget_curve")
            else None
        ),
        "load": lambda: _load(total, content["model"]["moe_layers"]),
        "together": lambda: _together(total, content["model"]["moe_layers"]),
        "specialization": (
            (lambda: _specialization(groups, content["model"]["moe_layers"]))
            if len(groups) > 1
            else None
        ),
    }
    drawn = {}
    with rc_context(STYLE), warnings.catch_warnings():
        # A letter that matplotlib's font lacks is a box in the PNG; a browser has it.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ ")
        for name, draw in figures.items():
            if draw is None:
                continue
            figure, title, alt = draw()
            figure.savefig(folder / f"{name}.png", dpi=120)
            path = folder / f"{name}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None})
            drawn[name] = Drawn(title, alt, path.read_bytes())
    return drawn


def _layers(statistics: dict[str, Any]) -> tuple[Figure, str, str]:
    rows = statistics["layers"]
    layers = [row["layer"] for row in rows]
    value = {name: [row["experts_per_token"][name] for row in rows] for name in rows[0][KEY]}
    figure, axes = _figure(5.4, 3.6)
    axes.fill_between(layers, value["p5"], value["p95"], color=BLUE, alpha=0.18, linewidth=0)
    axes.fill_between(layers, value["p25"], value["p75"], color=BLUE, alpha=0.32, linewidth=0)
    axes.plot(layers, value["mean"], "o-", color=BLUE, label="mean", markersize=4)
    mean = statistics["all"][KEY]["mean"]
    axes.axhline(mean, color=INK, linewidth=1, linestyle="--", label=f"all layers: {mean:.2f}")
    axes.fill_between([], [], color=BLUE, alpha=0.5, linewidth=0, label="25 to 75 % of tokens")
    axes.fill_between([], [], color=BLUE, alpha=0.18, linewidth=0, label="5 to 95 %")
    axes.set(xlabel="layer", ylabel="experts per token", ylim=(0, None))
    _whole_numbers(axes, layers)
    axes.legend(ncols=2, loc="lower right")
    alt = "Mean experts per token by layer: " + ", ".join(
        f"layer {layer} {mean:.2f}" for layer, mean in zip(layers, value["mean"], strict=True)
    )
    return figure, "Experts per token, layer by layer", alt


def _distribution(statistics: dict[str, Any], total: RoutingCounts) -> tuple[Figure, str, str]:
    layers = total.shape.layers
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    share_K = 100 * total.experts_LK.sum(axis=0) / total.experts_LK.sum()
    last = int(np.flatnonzero(share_K)[-1])
    numbers = range(0 if share_K[0] else 1, last + 1)  # most rules leave no token without an expert
    left.bar(numbers, share_K[numbers.start : last + 1], color=BLUE)
    left.set(title="in one layer", xlabel="experts of a token", ylabel="% of tokens")
    _whole_numbers(left, list(numbers))
    present = np.flatnonzero(total.total_K)
    bins = np.linspace(present[0] - 0.5, present[-1] + 0.5, min(len(present), 40) + 1) / layers
    right.hist(
        present / layers, bins=bins, weights=100 * total.total_K[present] / total.tokens, color=BLUE
    )
    mean = statistics["all"][KEY]["mean"]
    right.axvline(mean, color=INK, linewidth=1, linestyle="--")
    right.set(title="mean over the layers", xlabel=f"experts per token (mean {mean:.2f})")
    spread = statistics["all"]["experts_per_token_and_layer"]
    alt = (
        f"In one layer a token uses {spread['mean']:.2f} experts on average, with a standard "
        f"deviation of {spread['std']:.2f} and at most {spread['max']:.0f}"
    )
    if share_K[0]:
        alt += f"; {share_K[0]:.1f} % have none"
    return figure, "How many experts a token uses", alt


def _groups(statistics: dict[str, Any]) -> tuple[Figure, str, str]:
    rows = sorted(statistics["groups"].items(), key=lambda item: item[1][KEY]["mean"])
    figure, axes = _figure(5.4, 1.2 + 0.34 * len(rows))
    means = [row[KEY]["mean"] for _, row in rows]
    names = [_short(name) for name, _ in rows]
    for place, (_, row) in enumerate(rows):
        axes.plot(
            [row[KEY]["p5"], row[KEY]["p95"]], [place] * 2, color=BLUE, alpha=0.25, linewidth=9
        )
        axes.plot(
            [row[KEY]["p25"], row[KEY]["p75"]], [place] * 2, color=BLUE, alpha=0.5, linewidth=9
        )
    axes.plot(means, range(len(rows)), "D", color=INK, markersize=4)
    for place, mean in enumerate(means):
        axes.annotate(f"{mean:.2f}", (mean, place), (0, 8), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(rows)), names)
    axes.set(
        xlabel="experts per token, mean over layers",
        ylim=(-0.6, len(rows) - 0.3),
    )
    axes.grid(visible=False, axis="y")
    alt = "Mean experts per token by group: " + ", ".join(
        f"{name} {row[KEY]['mean']:.3f}" for name, row in reversed(rows)
    )
    return figure, "Experts per token, group by group", alt


def _loss(statistics: dict[str, Any]) -> tuple[Figure, str, str]:
    figure, axes = _figure(5.4, 3.6)
    parts = []
    for kind, color, what in (
        ("own", BLUE, "the token's own loss"),
        ("next", ORANGE, "the loss of what it predicts"),
    ):
        points = statistics["experts_by_loss"][kind]
        found = statistics["all"]["rank_correlation"][f"{kind}_loss"]
        label = f"{what}: {describe_correlation(found)}"
        parts.append(label)
        axes.plot(
            [point["loss"] for point in points],
            [point["experts"] for point in points],
            "o-",
            color=color,
            markersize=4,
            label=label,
        )
    axes.set(
        xlabel="loss, nats (each point: the same number of tokens)", ylabel="experts per token"
    )
    # Above the axes: the curves may be anywhere in them.
    axes.legend(title="rank correlation", alignment="left", loc="lower left", bbox_to_anchor=(0, 1))
    return figure, "Do harder tokens use more experts?", "Rank correlation with " + "; ".join(parts)


def _has_influences(statistics: dict[str, Any]) -> bool:
    rows = statistics["influences"]
    return any(row[name]["partial"] is not None for row in rows for name in INFLUENCES)


def _influences(statistics: dict[str, Any]) -> tuple[Figure, str, str]:
    rows = statistics["influences"]
    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
    layers, parts = [row["layer"] for row in rows], []
    for panel, name in zip(panels, INFLUENCES, strict=True):
        found = [row[name] for row in rows]
        value = {key: [_or_nan(one[key]) for one in found] for key in found[0]}
        panel.axhline(0, color=INK, linewidth=0.8)
        panel.fill_between(layers, value["low"], value["high"], color=BLUE, alpha=0.25, linewidth=0)
        panel.plot(layers, value["partial"], "o-", color=BLUE, markersize=3, label="partial")
        panel.plot(layers, value["plain"], "--", color=ORANGE, linewidth=1, label="plain")
        panel.set_title(INFLUENCE_TITLES[name], fontsize=10)
        _whole_numbers(panel, layers)
        known = [(one["partial"], layer) for one, layer in zip(found, layers, strict=True)]
        known = [one for one in known if one[0] is not None]
        if known:
            partial, layer = max(known, key=lambda one: abs(one[0]))
            parts.append(f"{INFLUENCE_TITLES[name]} {partial:.2f} in layer {layer}")
    panels[0].legend(fontsize=8)
    figure.supxlabel("layer", fontsize=10)
    figure.supylabel("rank correlation with experts", fontsize=10)
    alt = "Strongest partial rank correlations with experts per token: " + "; ".join(parts)
    return figure, "Difficulty, entropy, or something else?", alt


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _positions(statistics: dict[str, Any]) -> tuple[Figure, str, str]:
    rows = statistics["positions"]
    places = [(row["first"] + row["last"]) / 2 + 1 for row in rows]
    figure, axes = _figure(5.4, 3.6)
    by_layer = np.array([row["by_layer"] for row in rows])
    for index, means in enumerate(by_layer.T):
        label = "each layer" if index == 0 else None
        axes.plot(places, means, color=BLUE, alpha=0.35, linewidth=0.8, label=label)
    means = [row["experts"] for row in rows]
    axes.plot(places, means, color=BLUE, linewidth=2, label="all layers")
    axes.set(xlabel="position in the window", ylabel="experts per token", ylim=(0, None))
    axes.legend(ncols=2, loc="lower right")
    alt = f"Mean experts per token from {means[0]:.2f} at a window's start to {means[-1]:.2f}"
    return figure, "Experts per token along the text", alt


def _sweep(sweep: dict[str, Any]) -> tuple[Figure, str, str]:
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    points, own = sweep["points"], sweep["own"]
    star = "as trained" if sweep["as_trained"] else "as set for inference"
    thresholds = [point["threshold"] for point in points]
    experts = [point["experts"] for point in points]
    left.plot(thresholds, experts, "o-", color=BLUE, markersize=4)
    left.set(title="experts per token", xlabel="threshold", ylim=(0, None))
    if own["threshold"] is None:
        left.axhline(own["experts"], color=ORANGE, linestyle="--", linewidth=1)
    else:
        left.plot(own["threshold"], own["experts"], "*", color=ORANGE, markersize=13)
    if own["loss"] is not None:
        right.plot(experts, [point["loss"] for point in points], "o-", color=BLUE, markersize=4)
        right.plot(own["experts"], own["loss"], "*", color=ORANGE, markersize=13, label=star)
        right.legend(loc="upper center")
    right.set(title="loss, nats per token", xlabel="experts per token")
    own_name = star if own["threshold"] is None else f"threshold {own['threshold']:.4g}"
    alt = f"Its own ({own_name}): {_point(own)}. " + "; ".join(
        f"threshold {point['threshold']:g}: {_point(point)}" for point in points
    )
    return figure, "Other thresholds than its own", alt


def _budgets(curve: list[dict[str, Any]]) -> tuple[Figure, str, str]:
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    with_loss = [point for point in curve if point.get("loss") is not None]
    panels = figure.subplots(1, 2 if with_loss else 1, squeeze=False)[0]
    thresholds = [point["threshold"] for point in curve]
    x = [point[KEY] for point in curve]
    # The first threshold may be 0, and the marker has a lower half, too.
    panels[0].plot(x, thresholds, "o-", color=BLUE, markersize=4, clip_on=False)
    panels[0].set(title="threshold", xlabel="experts per token asked for", ylim=(0, None))
    if with_loss:
        x, y = [point[KEY] for point in with_loss], [point["loss"] for point in with_loss]
        panels[1].plot(x, y, "o-", color=BLUE, markersize=4)
        panels[1].set(title="loss, nats per token", xlabel="experts per token asked for")
    alt = "; ".join(
        f"{point[KEY]:g} experts: threshold {point['threshold']:.4g}"
        + ("" if point.get("loss") is None else f", loss {point['loss']:.3f}")
        for point in curve
    )
    return figure, "Budgets", alt


def _point(point: dict[str, Any]) -> str:
    loss = "" if point["loss"] is None else f", loss {point['loss']:.3f}"
    return f"{point['experts']:.2f} experts{loss}"


def _load(total: RoutingCounts, moe_layers: list[int]) -> tuple[Figure, str, str]:
    mean_L1 = total.load_LE.mean(axis=1, keepdims=True)
    figure, axes = _figure(5.4, 1.6 + 0.22 * min(len(moe_layers), 40))
    with np.errstate(invalid="ignore"):  # a rule may leave every token of a layer without one
        ratio_LE = total.load_LE / mean_L1
    image = _draw_ratios(axes, ratio_LE)
    axes.set(xlabel="expert", ylabel="layer")
    _ticks(axes, moe_layers)
    _ratio_bar(figure, image, axes, "tokens / mean of the layer")
    unused = int((total.load_LE == 0).sum())
    alt = (
        f"The busiest expert has {np.nan_to_num(ratio_LE).max():.2f} times the mean load of its "
        f"layer; {unused} of {total.load_LE.size} experts were not used"
    )
    return figure, "Load of each expert", alt


def _together(total: RoutingCounts, moe_layers: list[int]) -> tuple[Figure, str, str]:
    shown = np.unique(
        np.linspace(0, len(moe_layers) - 1, min(len(moe_layers), MAX_PANELS)).round().astype(int)
    )
    columns = min(len(shown), 3)
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(5.4, 0.5 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    with np.errstate(invalid="ignore"):
        share_LEE = 100 * total.together_LEE / total.load_LE[:, :, None]
    experts = np.arange(total.shape.experts)
    share_LEE[:, experts, experts] = np.nan
    most = float(np.nan_to_num(share_LEE).max())
    image: Any = None
    for panel, index in zip(panels, shown, strict=False):
        image = panel.imshow(
            share_LEE[index], cmap="viridis", vmin=0, vmax=max(most, 1), interpolation="nearest"
        )
        panel.set(title=f"layer {moe_layers[index]}")
        panel.grid(visible=False)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    figure.supxlabel("and also expert", fontsize=10)
    figure.supylabel("tokens of expert", fontsize=10)
    bar = figure.colorbar(image, ax=panels.tolist(), shrink=0.7, label="% of them")
    bar.outline.set_visible(False)
    alt = f"Of an expert's tokens at most {most:.0f} % share one other expert"
    return figure, "Experts that are used together", alt


def _specialization(
    groups: dict[str, RoutingCounts], moe_layers: list[int]
) -> tuple[Figure, str, str]:
    total = add_up(groups)
    largest = sorted(groups, key=lambda name: -groups[name].tokens)[:MAX_PANELS]
    shown = [name for name in groups if name in largest]
    columns = min(len(shown), 2)
    rows = math.ceil(len(shown) / columns)
    height = 0.8 + 0.12 * min(len(moe_layers), 30)
    figure = Figure(figsize=(5.4, 0.6 + height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    image: Any = None
    strongest = ("", 0.0)
    for panel, name in zip(panels, shown, strict=False):
        lift_LE = lift(total, groups[name])
        strongest = max(strongest, (name, float(np.nan_to_num(lift_LE).max())), key=lambda x: x[1])
        image = _draw_ratios(panel, lift_LE)
        panel.set(title=_short(name, LONGEST_TITLE))
        _ticks(panel, moe_layers)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    figure.supxlabel("expert", fontsize=10)
    figure.supylabel("layer", fontsize=10)
    _ratio_bar(figure, image, panels.tolist(), "tokens / as many of all text")
    title = "Experts for one kind of text"
    if len(shown) < len(groups):
        title += f" (the {len(shown)} largest groups of {len(groups)})"
    name, times = strongest
    alt = f"Strongest: an expert that {name} uses {times:.1f} times as often as all text"
    return figure, title, alt


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _draw_ratios(axes: Axes, ratio_LE: np.ndarray) -> Any:
    """Colors from a quarter to four times; a cross if there is no ratio."""
    with np.errstate(divide="ignore"):
        log_LE = np.log2(ratio_LE)
    axes.grid(visible=False)
    for layer, expert in np.argwhere(np.isnan(log_LE)):
        axes.text(expert, layer, "\u00d7", ha="center", va="center", fontsize=7)
    return axes.imshow(log_LE, cmap=RATIOS, vmin=-2, vmax=2, aspect="auto", interpolation="nearest")


def _ratio_bar(figure: Figure, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, label=label, ticks=[-2, -1, 0, 1, 2], extend="both")
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.outline.set_visible(False)


def _ticks(axes: Axes, moe_layers: list[int]) -> None:
    step = math.ceil(len(moe_layers) / 12)
    axes.set_yticks(range(0, len(moe_layers), step), [str(layer) for layer in moe_layers[::step]])


def _whole_numbers(axes: Axes, values: list[int]) -> None:
    axes.set_xticks(values[:: math.ceil(len(values) / 12)])


def _short(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that fits beside a figure, without signs that matplotlib reads as mathematics."""
    # Chinese, Japanese and Korean letters are two wide.
    widths = np.cumsum([1 + (unicodedata.east_asian_width(letter) in "WF") for letter in name])
    if (widths > longest).any():
        name = name[: int((widths < longest).sum())] + "\u2026"
    return name.replace("$", r"\$")
