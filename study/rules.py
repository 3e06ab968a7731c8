"""Every rule of routing at the same mean number of experts, so at equal FLOPs.

    python -m study.rules [--only NAME ...] [--list] [--quick]

Same text, model, tokens and seeds for all, on the study's text and with its model; those of a
varying number are held at 2 experts per token on average. Losses are those on all held-out text.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from study import corpus, runs
from study.parts import Part, Rows, end, of_variant
from study.results import Results, pooled_deviation
from study.variants import SEEDS, TARGET, Variant
from study.variants import VARIANTS as MAIN

REFERENCE, LOSS = "dtop_p", "validation_loss"
# For 2 experts: 0.24 gave 2.09 and 0.3322 gave 2.60 on held-out text, and the line through both
# passes 2.00 here.
FIXED_THRESHOLD = 0.222


def _rule(name: str, title: str, routing: str, more: str = "") -> Variant:
    flags = f"--moe-dynamic-routing {routing} --moe-dynamic-target-experts-per-token {TARGET:g} "
    return Variant(name, title, flags + more, SEEDS)


def _of_main(name: str) -> Variant:
    """A variant of the main study, with all seeds."""
    variant = MAIN[name]
    return Variant(name, variant.title, variant.flags, SEEDS)


def _with_threshold(name: str, threshold: float) -> Variant:
    """A variant of the main study at another threshold, with all seeds."""
    variant = _of_main(name)
    flags = f"{variant.flags} --moe-dynamic-threshold {threshold:g}"  # the last one counts
    return replace(variant, title=f"{variant.title}, threshold {threshold:g}", flags=flags)


VARIANTS = {
    variant.name: variant
    for variant in (
        _of_main(REFERENCE),
        _of_main("top2"),
        _of_main("no_drn"),
        # "DRN without controller" at the count of the others.
        _with_threshold("no_controller", FIXED_THRESHOLD),
        _of_main("by_layer"),
        _rule("expert_threshold", "expert threshold", "expert_threshold"),
        _rule("null_zero", "null experts, zero", "null_experts"),
        _rule(
            "null_identity",
            "null experts, identity",
            "null_experts",
            "--moe-dynamic-null-kind identity",
        ),
        _rule("seq_top_k", "SeqTopK", "seq_top_k"),
        _rule("relu", "ReLU", "relu"),
        _of_main("dense"),
        _of_main("top1"),
    )
}


def _measure(run: runs.Run, text: corpus.Corpus) -> dict[str, Any]:
    from study import afterwards  # imports PyTorch

    return afterwards.held_out(run, text)


def table(rows: Rows, of_main: Results | None = None) -> list[str]:
    """Loss and experts of each rule, and how it differs from DTop-p, in Markdown.

    Args:
        of_main: results of the main study, whose seeds count in what seeds alone cause, too.
    """
    losses = {name: [row[LOSS] for row in of_variant(rows, name)] for name in VARIANTS}
    of_others = [] if of_main is None else [of_main.values(name, LOSS) for name in of_main.rows]
    noise = pooled_deviation([*losses.values(), *of_others])
    lines = ["| rule | seeds | held-out loss | experts per token | more than DTop-p, 95 % | |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, variant in VARIANTS.items():
        experts = [
            row["validation_experts_per_token"]
            for row in of_variant(rows, name)
            if "validation_experts_per_token" in row
        ]
        difference = ("", "")
        if name != REFERENCE:
            difference = _difference(losses[REFERENCE], losses[name], noise)
        cells = [
            variant.title,
            str(len(losses[name])),
            f"{statistics.fmean(losses[name]):.4f}" if losses[name] else "-",
            f"{statistics.fmean(experts):.2f}" if experts else "-",
            *difference,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _difference(
    reference: list[float], losses: list[float], noise: float | None
) -> tuple[str, str]:
    """The difference of the means with its interval, and a verdict."""
    if not reference or not losses:
        return "-", ""
    difference = statistics.fmean(losses) - statistics.fmean(reference)
    if noise is None:
        return f"{difference:+.4f}", ""
    half = 2 * noise * (1 / len(reference) + 1 / len(losses)) ** 0.5
    low, high = difference - half, difference + half
    verdict = "worse" if low > 0 else "better" if high < 0 else "not clear"
    return f"{difference:+.4f} ({low:+.4f} to {high:+.4f})", verdict


PART = Part("rules", __doc__, VARIANTS, _measure, table)

if __name__ == "__main__":
    end(PART)
