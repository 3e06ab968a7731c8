"""Every rule of routing at the same mean number of experts, so at equal FLOPs.

    python -m study.rules [--only NAME ...] [--list] [--quick]

Same text, model, tokens and seeds for all, on the study's text and with its model; those of a
varying number are held at 2 experts per token on average. Losses are those on all held-out text.
"""

from __future__ import annotations

from dataclasses import replace

from study.parts import Part, Rows, cells, end, held_out, losses, more_than, noise, of_variant
from study.results import Results
from study.variants import SEEDS, TARGET, Variant
from study.variants import VARIANTS as MAIN

REFERENCE = "dtop_p"
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


def table(rows: Rows, of_main: Results | None = None) -> list[str]:
    """Loss and experts of each rule, and how it differs from DTop-p, in Markdown."""
    found = losses(rows)
    deviation = noise(found.values(), of_main)
    lines = ["| rule | seeds | held-out loss | experts per token | more than DTop-p, 95 % | |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, variant in VARIANTS.items():
        more = more_than(REFERENCE, name, found, deviation)
        row = [variant.title, *cells(of_variant(rows, name)), *more]
        lines.append(f"| {' | '.join(row)} |")
    return lines


PART = Part("rules", __doc__, VARIANTS, held_out, table)

if __name__ == "__main__":
    end(PART)
