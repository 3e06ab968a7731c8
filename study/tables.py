"""The tables of docs/study.md."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from megatron_dynmoe.analysis.results.statistics import EXTREMES, describe_correlation
from study.results import TOLERANCE, WORST, Results, percent
from study.variants import VARIANTS


def routings(results: Results) -> list[str]:
    """One row per routing: loss, experts, work and time."""
    rows = [
        "| routing | seeds | validation loss | experts per token, validation | std over tokens "
        "| TFLOP in experts | processor s a step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, variant in VARIANTS.items():
        if name in results.rows:
            rows.append(_row(results, name, variant.title))
    return rows


def holding(results: Results) -> list[str]:
    """How well each run with a target holds it."""
    rows = [
        f"| {VARIANTS[name].title} | {row['seed']} | {_percent(row['peak_excursion'])} at "
        f"{row['peak_step']} | {row['held_from_step'] or 'never'} | "
        f"{_percent(row['worst_excursion'])} | {_percent(row['worst_step'])} |"
        for name in VARIANTS
        for row in results.rows.get(name, ())
        if "held_from_step" in row
    ]
    if not rows:
        return []
    return [
        "### How well a target is held",
        "",
        "| routing | seed | worst mean, at step | held from step | worst mean after "
        "| worst step after |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        paragraph(
            "The figures are distances from the target, of means over ten steps, because a single "
            "small batch is off by chance. A count is held from the first step whose mean is "
            f"within {percent(TOLERANCE, 0)} and after which no mean is beyond "
            f"{percent(WORST, 0)}. A count that begins at its target and leaves it, or only "
            "passes it, is not held. The last column is the worst single step from there on.",
        ),
        "",
    ]


def patterns(results: Results) -> list[str]:
    """Layers of all models; sources and tokens of the models that were analyzed."""
    found = results.content["analysis"]
    lines = [
        "### Layers, sources and tokens",
        "",
        "![Experts by layer](images/study_layers.png)",
        "",
    ]
    if not found:
        return lines
    columns = [_pattern(item) for item in found]
    titles = [VARIANTS[item["variant"]].title for item in found]
    return [
        *lines,
        f"| held-out text, first seed | {' | '.join(titles)} |",
        f"| --- |{' --- |' * len(found)}",
        *(f"| {name} | {' | '.join(escaped(c[name]) for c in columns)} |" for name in columns[0]),
        "",
        paragraph(
            "The tokens are those that appear at least 20 times, by their mean number of experts; "
            "a space shows as \u2423. [This page](analysis.md) says what counts as a word, and how "
            "else to look at a model. The rank correlation is a plain one, of which [little is "
            "left](#influences) all else equal.",
        ),
        "",
    ]


def paragraph(text: str) -> str:
    """Lines of at most 100, which would show a space after a hyphen at their end."""
    return fill(text, 100, break_on_hyphens=False)


def escaped(cell: Any) -> str:
    """Text that stays in its cell."""
    return str(cell).replace("|", "\\|").replace("\n", " ")


def _row(results: Results, name: str, title: str) -> str:
    def cell(values: Sequence[float], digits: int) -> str:
        if not values:
            return "-"
        text = f"{statistics.fmean(values):.{digits}f}"
        if len(values) > 1:
            text += f" ({statistics.stdev(values):.{digits}f})"
        return text

    cells = [
        title,
        str(len(results.rows[name])),
        cell(results.values(name, "validation_loss"), 4),
        cell(results.experts(name), 3),
        cell(results.values(name, "validation_std_experts_per_token"), 3),
        f"{results.mean(name, 'expert_flops') / 1e12:,.1f}",
        cell(results.values(name, "processor_seconds_per_step"), 3),
    ]
    return f"| {' | '.join(cells)} |"


def _pattern(found: dict[str, Any]) -> dict[str, str]:
    """The figures of an analyzed model, by the name of their row."""
    by_layer = " ".join(f"{value:.2f}" for value in found["experts_by_layer"])
    words = {name: found[f"words_among_{name}"] for name in ("most", "fewest")}
    enough = found["frequent_tokens"] >= 2 * EXTREMES
    return {
        "experts by layer, from the bottom": by_layer,
        **{
            f"experts, {source}": f"{mean:.2f}"
            for source, mean in found["experts_by_source"].items()
        },
        "rank correlation of a token's experts and its loss": describe_correlation(
            found["correlation_with_loss"]
        ),
        "tokens with most experts": _tokens(found["most"]),
        "tokens with fewest experts": _tokens(found["fewest"]),
        **{
            f"complete words among the {EXTREMES} with {name}": (
                percent(share, 0) if enough and share is not None else "too few tokens"
            )
            for name, share in words.items()
        },
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else percent(share)


def _tokens(texts: Sequence[str]) -> str:
    """Tokens as code, with Markdown's special characters escaped."""
    return " ".join(
        f"<code>{re.sub(r'([\\`*_~[])', r'\\\1', html.escape(text))}</code>" for text in texts
    )
