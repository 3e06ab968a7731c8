"""Draws the newest rows of each workload: docs/images/benchmark_{select,layer,train}_{cpu,gpu}.png.

python benchmarks/plot.py [--results benchmarks/results] [--images docs/images]

docs/images/benchmark_busiest_rank.png is drawn, too, from the rows of busiest_rank.py draw.
"""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from megatron_dynmoe.settings.messages.command_line import CommandParser

ROOT = Path(__file__).resolve().parent.parent
INK, MUTED = "#1f2328", "#6e7781"
OURS_COLORS, OTHER_COLORS = ("#0b6e6e", "#6bb5b0"), ("#8c959f", "#ced4da")

# Of benchmarks/busiest_rank.py, in the order in which they are drawn.
RANK_ROUTINGS = {
    "top_k": ("top-8", OTHER_COLORS[0]),
    "dtop_p": ("DTop-p, target 8", OURS_COLORS[0]),
    "dtop_p_cap": ("DTop-p, target 8, cap of 16", OURS_COLORS[1]),
}
RANK_TOKENS = "4096"  # of a rank's micro-batch

Row = dict[str, str]


class Figure(NamedTuple):
    """Which columns of the rows a picture shows."""

    title: str
    file: str
    parts: dict[str, str]  # a bar's parts, one after another: column to legend
    low: str | None  # 20th and 80th percentile of the whole bar
    high: str | None
    unit: str
    roofline: str
    remark: tuple[str, str]  # behind a bar: a column and its meaning


FIGURES = {
    "select": Figure(
        "Selecting experts, forward and backward",
        "select.csv",
        {"median_ms": ""},
        "p20_ms",
        "p80_ms",
        "ms",
        "roofline_ms",
        ("median_ratio_to_stock", "of stock"),
    ),
    "layer": Figure(
        "One MoE layer",
        "layer.csv",
        {"forward_ms": "forward", "backward_ms": "backward"},
        None,
        None,
        "ms",
        "roofline_ms",
        ("of_ceiling", "of the ceiling"),
    ),
    "train": Figure(
        "One training step",
        "train_step.csv",
        {"median_s": ""},
        "p20_s",
        "p80_s",
        "s",
        "roofline_s",
        ("of_ceiling", "of the ceiling"),
    ),
}


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    args.images.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        path = args.results / figure.file
        if not path.exists():
            continue
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for kind in ("cpu", "gpu"):
            workloads = newest([row for row in rows if device(row) == kind], figure)
            if workloads:
                image = args.images / f"benchmark_{name}_{kind}.png"
                draw(figure, workloads, image)
                print(f"wrote {image}")
    path = args.results / "busiest_rank_drawn.csv"
    if path.exists():
        image = args.images / "benchmark_busiest_rank.png"
        with path.open(newline="") as file:
            draw_waiting(list(csv.DictReader(file)), image)
        print(f"wrote {image}")


def device(row: Row) -> str:
    return "cpu" if " CPUs, " in row["hardware"] else "gpu"


def newest(rows: list[Row], figure: Figure) -> dict[str, list[Row]]:
    """The rows of each workload's last run, by workload; only those with a roofline."""
    complete = [row for row in rows if row.get(figure.roofline)]
    last = {row["workload"]: (row["date"], row["commit"], row["hardware"]) for row in complete}
    chosen: dict[str, dict[str, Row]] = {}
    for row in complete:
        if (row["date"], row["commit"], row["hardware"]) == last[row["workload"]]:
            chosen.setdefault(row["workload"], {})[row["provider"]] = row
    return {workload: list(by_provider.values()) for workload, by_provider in chosen.items()}


def draw(figure: Figure, workloads: dict[str, list[Row]], image: Path) -> None:
    """One panel per workload: bars of the providers, and the roofline as a line."""
    columns = min(2, len(workloads))
    lines = -(-len(workloads) // columns)
    tallest = max(len(rows) for rows in workloads.values())
    plot, axes = plt.subplots(
        lines,
        columns,
        figsize=(6.4 * columns, lines * (1.3 + 0.36 * tallest) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for panel in axes.flat[len(workloads) :]:
        panel.axis("off")
    for panel, (workload, rows) in zip(axes.flat, workloads.items(), strict=False):
        draw_panel(panel, figure, workload, rows)
    first = next(iter(workloads.values()))[0]
    commits = dict.fromkeys(row["commit"] for rows in workloads.values() for row in rows)
    where = (
        f"{first['hardware']}, {first['versions']}, commit {', '.join(commits)}, {first['date']}"
    )
    plot.suptitle(figure.title, fontsize=13, color=INK, weight="bold")
    lines_below = textwrap.wrap(where, 95 * columns)
    plot.supxlabel("\n".join(lines_below), fontsize=7.5, color=MUTED)
    plot.savefig(image, dpi=130)
    plt.close(plot)


def draw_panel(panel: Axes, figure: Figure, workload: str, rows: list[Row]) -> None:
    names = [row["provider"] for row in rows]
    column, meaning = figure.remark
    longest = 0.0
    for place, row in enumerate(rows):
        part_colors = OURS_COLORS if is_ours(row["provider"]) else OTHER_COLORS
        end = 0.0
        for (part, _), color in zip(figure.parts.items(), part_colors, strict=False):
            panel.barh(place, float(row[part]), left=end, height=0.62, color=color)
            end += float(row[part])
        if figure.low and figure.high:
            spread = [[end - float(row[figure.low])], [float(row[figure.high]) - end]]
            panel.errorbar(end, place, xerr=spread, color=INK, linewidth=1, capsize=2)
            end = float(row[figure.high])
        total = sum(float(row[part]) for part in figure.parts)
        text = f"{total:.0f} {figure.unit}" if total >= 100 else f"{total:.3g} {figure.unit}"
        text += f", {float(row[column]):.2f} {meaning}" if row[column] else ""
        panel.annotate(
            text, (end, place), (5, 0), textcoords="offset points",
            va="center", fontsize=8, color=INK,
        )  # fmt: skip
        longest = max(longest, end)
    roofline = max(float(row[figure.roofline]) for row in rows)
    panel.axvline(roofline, color="#b35900", linestyle="--", linewidth=1, label="roofline")
    for (_, legend), color in zip(figure.parts.items(), OTHER_COLORS, strict=False):
        if legend:
            panel.barh(0, 0, color=color, label=legend)
    panel.legend(fontsize=7.5, frameon=False, loc="lower right")
    panel.set_yticks(range(len(rows)), labels=names, fontsize=8.5)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.6 * max(longest, roofline))
    panel.set_xlabel(figure.unit, fontsize=8, color=MUTED)
    panel.set_title("\n".join(textwrap.wrap(workload, 72)), fontsize=8.5, color=INK, loc="left")
    panel.tick_params(axis="x", labelsize=8, colors=MUTED)
    panel.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def draw_waiting(rows: list[Row], image: Path) -> None:
    """The share of a step that ranks wait for the busiest one: bars of routings by ranks."""
    rows = [row for row in rows if row["tokens_of_a_rank"] == RANK_TOKENS]
    ranks = sorted({int(row["ranks"]) for row in rows})
    plot, panel = plt.subplots(figsize=(7.2, 3.9), layout="constrained")
    width = 0.8 / len(RANK_ROUTINGS)
    for number, (routing, (label, color)) in enumerate(RANK_ROUTINGS.items()):
        # The last run of each number of ranks.
        last = {int(row["ranks"]): row for row in rows if row["routing"] == routing}
        for place, count in enumerate(ranks):
            lost, upper = (100 * float(last[count][c]) for c in ("share_lost", "share_lost_95th"))
            at = place + (number - (len(RANK_ROUTINGS) - 1) / 2) * width
            panel.bar(at, lost, 0.92 * width, color=color, label=label if not place else None)
            panel.errorbar(at, lost, [[0], [upper - lost]], color=INK, linewidth=1, capsize=2)
            panel.annotate(
                f"{lost + 1e-9:.1f}",  # a half, such as 9.25, goes up, as in the docs
                (at, upper), (0, 2), textcoords="offset points",
                ha="center", fontsize=8, color=INK,
            )  # fmt: skip
    panel.set_xticks(range(len(ranks)), labels=ranks, fontsize=8.5)
    panel.set_xlabel("expert-parallel ranks", fontsize=8, color=MUTED)
    panel.set_ylabel("% of a step, and 95th percentile", fontsize=8, color=MUTED)
    panel.set_title("Lost to waiting for the busiest rank", fontsize=13, color=INK, weight="bold")
    panel.legend(fontsize=8, frameon=False, loc="upper left")
    panel.tick_params(axis="both", labelsize=8, colors=MUTED, length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    share = 100 * float(rows[-1]["share_of_experts"])
    assumed = (
        f"On paper: {int(RANK_TOKENS):,} tokens of a rank, drawn from the last quarter of "
        f"{rows[-1]['steps']} steps of a model of 64 experts and 4 layers; experts lie on ranks in "
        "order; each layer waits for its busiest rank alone; time is floating-point operations, of "
        f"which experts do {share:.0f} % as in DTop-p's 6.9 B model."
    )
    plot.supxlabel("\n".join(textwrap.wrap(assumed, 118)), fontsize=7.5, color=MUTED)
    plot.savefig(image, dpi=130)
    plt.close(plot)


def is_ours(provider: str) -> bool:
    """Whether a bar shows dynamic routing on our back end."""
    return provider.startswith("ours") or provider.startswith("torch_native dtop_p")


if __name__ == "__main__":
    main()
