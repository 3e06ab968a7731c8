"""The pictures of the study's pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

from megatron_dynmoe.runs.drawing.curves import save_figure
from study import budgets, rules
from study.axes import Leads
from study.parts import Rows
from study.results import Comparison, Results
from study.variants import TARGET, VARIANTS

BETTER, WORSE, UNCLEAR = "C2", "C3", "C7"  # colors
CURVES = ("dtop_p", "no_drn", "no_controller", "fixed_020", "fixed_030", "top_p_04")
LAYERS = ("dtop_p", "no_drn", "by_layer", "fixed_020", "top_p_04", "top_p_04_no_dynamic_loss")


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw all figures for which there are results; returns the files."""
    pictures = {"loss": _draw_loss, "experts": _draw_experts, "layers": _draw_layers}
    if results.content["post_hoc"]:
        pictures["post_hoc"] = _draw_post_hoc
    written = []
    for name, draw in pictures.items():
        figure = draw(results)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        written.append(folder / f"study_{name}.png")
        save_figure(figure, written[-1], dpi=110)
    return written


def _draw_loss(results: Results) -> Any:
    """One dot per seed, best variant at the top; beside it, in the same colors, the cost."""
    colors = [*plt.get_cmap("tab10").colors, "black"]
    names = sorted(results.rows, key=lambda name: -results.mean(name, "validation_loss"))
    figure, (by_variant, by_compute) = plt.subplots(
        1, 2, figsize=(11, 0.4 * len(names) + 1.5), layout="constrained"
    )
    for place, name in enumerate(names):
        losses = results.values(name, "validation_loss")
        color = colors[list(VARIANTS).index(name)]
        by_variant.plot(losses, [place] * len(losses), "o", color=color)
        by_compute.plot(results.values(name, "expert_flops"), losses, "o", color=color)
    by_variant.set_yticks(range(len(names)), [VARIANTS[name].title for name in names])
    by_variant.set(title="validation loss, one dot per seed", xlabel="nats per token")
    by_compute.set(
        title="against measured expert compute",
        xlabel="floating-point operations in experts",
        ylabel="nats per token",
    )
    by_compute.xaxis.set_major_formatter(EngFormatter(sep=" "))
    for axis in (by_variant, by_compute):
        axis.grid(alpha=0.25)
    return figure


def _draw_experts(results: Results) -> Any:
    """Training as lines, validation as dots, with one standard deviation over tokens."""
    names = [name for name in CURVES if name in results.rows]
    figure, axes = plt.subplots(
        2, 3, figsize=(11, 6), sharex=True, layout="constrained", squeeze=False
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for number, row in enumerate(results.rows[name]):
            curve, validation = row["curve"], row["validation_curve"]
            mean, std = np.array(curve["experts"]), np.array(curve["std_experts"])
            color = f"C{number}"
            axis.plot(curve["tokens"], mean, color=color, linewidth=1)
            if number == 0:
                axis.fill_between(curve["tokens"], mean - std, mean + std, alpha=0.15, color=color)
            bars = validation["std_experts"] if number == 0 else None
            axis.errorbar(
                validation["tokens"],
                validation["experts"],
                bars,
                fmt="o",
                color=color,
                markersize=3,
                elinewidth=0.8,
                capsize=2,
            )
        axis.axhline(TARGET, color="black", linestyle="--", linewidth=0.8)
        axis.set(title=VARIANTS[name].title)
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    figure.supxlabel("tokens")
    figure.supylabel("experts per token (dots: validation)")
    return figure


def _draw_layers(results: Results) -> Any:
    """Experts of each layer at the end of training, the first seed."""
    names = [name for name in LAYERS if name in results.rows]
    layers_VL = np.array([results.rows[name][0]["experts_by_layer"] for name in names])
    figure, axis = plt.subplots(figsize=(8, 0.5 * max(len(names), 1) + 1.2), layout="constrained")
    if names:
        image = axis.imshow(layers_VL, aspect="auto")
        middle = (layers_VL.min() + layers_VL.max()) / 2
        for (row, column), value in np.ndenumerate(layers_VL):
            color = "white" if value < middle else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
        figure.colorbar(image, label="experts per token")
        axis.set_xticks(range(layers_VL.shape[1]), range(1, layers_VL.shape[1] + 1))
    axis.set_yticks(range(len(names)), [VARIANTS[name].title for name in names])
    axis.set(title="experts per token by layer, end of training", xlabel="layer")
    return figure


def _draw_post_hoc(results: Results) -> Any:
    """Loss against experts of the top-2 model with thresholds, beside its own routing."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    points = results.content["post_hoc"]
    for number, seed in enumerate(sorted({point["seed"] for point in points})):
        mine = [point for point in points if point["seed"] == seed]
        swept = sorted((p["experts"], p["loss"]) for p in mine if p["threshold"] is not None)
        (own,) = [point for point in mine if point["threshold"] is None]
        color = f"C{number}"
        axis.plot(*zip(*swept, strict=True), "o-", color=color, label=f"thresholds, seed {seed}")
        axis.plot(own["experts"], own["loss"], "*", color=color, markersize=12)
    axis.set(
        title="top-2 model routed by thresholds (star: its own routing)",
        xlabel="experts per token",
        ylabel="loss on held-out text, nats per token",
    )
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return figure


def draw_budgets(rows: Rows, folder: Path) -> Path:
    """Draw held-out loss against experts for each way to a budget, one dot per seed."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, way in enumerate(budgets.WAYS):
        points = [budgets.points_at(rows, way, budget) for budget in budgets.BUDGETS]
        means = [
            [np.mean([point[quantity] for point in seeds]) for seeds in points if seeds]
            for quantity in ("experts", "loss")
        ]
        axis.plot(*means, color=f"C{number}", label=way)
        for seeds in points:
            experts, losses = ([point[key] for point in seeds] for key in ("experts", "loss"))
            axis.plot(experts, losses, "o", color=f"C{number}", markersize=4)
    axis.set(xlabel="experts per token, held-out text", ylabel="nats per token")
    axis.legend(frameon=False)
    return _save(figure, folder / "study_budgets.png")


def draw_rules(rows: Rows, of_main: Results | None, folder: Path) -> Path:
    """Draw by how much each rule's loss is more than DTop-p's, with 95 % intervals."""
    found = rules.differences(rows, of_main)
    names = sorted(found, key=lambda name: -found[name].difference)  # the best at the top
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(names) + 1.2), layout="constrained")
    for place, name in enumerate(names):
        color = {True: BETTER, False: WORSE, None: UNCLEAR}[found[name].is_lower]
        _interval(axis, found[name], place, color, upright=False)
    axis.axvline(0, color="black", linestyle="--", linewidth=0.8)
    _clip(axis, [found[name] for name in names])
    axis.set_yticks(range(len(names)), [rules.VARIANTS[name].title for name in names])
    axis.set(xlabel="held-out loss more than DTop-p's, nats per token (95 %)")
    return _save(figure, folder / "study_rules.png")


def draw_leads(known: Mapping[str, Leads], folder: Path) -> Path:
    """Draw DTop-p's lead over top-k along each axis, with 95 % intervals."""
    figure, panels = plt.subplots(
        1, len(known), figsize=(3 * len(known), 3.4), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for panel, (name, found) in zip(panels.flat, known.items(), strict=True):
        for point, lead in found.items():
            color = {True: WORSE, False: BETTER, None: UNCLEAR}[lead.is_lower]
            _interval(panel, lead, point.at, color, upright=True, filled=point.in_trend)
        panel.axhline(0, color="black", linestyle="--", linewidth=0.8)
        panel.set_xscale("log", base=2)
        titles = [point.title.partition(":")[0] for point in found]
        panel.set_xticks([point.at for point in found], titles, rotation=30, ha="right")
        panel.minorticks_off()
        panel.margins(x=0.2)
        panel.set(title=name)
    figure.supylabel("lead of DTop-p, nats per token (95 %)", fontsize=10)
    return _save(figure, folder / "study_leads.png")


def _clip(axis: Any, shown: Sequence[Comparison]) -> None:
    """Let an interval of a noise of its own run out of the picture, with an arrow at its end."""
    known = [one.error for one in shown if np.isfinite(one.error)]
    if not known:
        return
    usual = 3 * float(np.median(known))
    ends = [
        (one.difference - error, one.difference + error)
        for one in shown
        for error in [one.error if np.isfinite(one.error) else 0.0]
    ]
    inside = [end for one, end in zip(shown, ends, strict=True) if one.error <= usual]
    dots = [one.difference for one in shown]
    low, high = min(*(end[0] for end in inside), *dots), max(*(end[1] for end in inside), *dots)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    axis.set_xlim(low, high)
    for place, (left, right) in enumerate(ends):
        for end, mark, is_out in ((low, "<", left < low), (high, ">", right > high)):
            if is_out:
                axis.plot(end, place, mark, color=UNCLEAR, markersize=7, clip_on=False)


def _interval(
    axis: Any, found: Comparison, at: float, color: str, *, upright: bool, filled: bool = True
) -> None:
    """A dot with its interval; the dot alone if nothing is known of the error."""
    error = found.error if np.isfinite(found.error) else None
    places = (at, found.difference) if upright else (found.difference, at)
    axis.errorbar(
        *places,
        **{"yerr" if upright else "xerr": error},
        fmt="o",
        color=color,
        markerfacecolor=color if filled else "white",
        markersize=5,
        capsize=3,
    )


def _save(figure: Any, path: Path) -> Path:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    save_figure(figure, path, dpi=110)
    return path
