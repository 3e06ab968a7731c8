"""The papers' claims: what they saw, and what the results of this study say to each.

The rule was fixed before any result was there: a difference of means counts when it is larger than
two standard errors, from the spread over seeds pooled over all variants that have several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from study.results import Comparison, Results
from study.variants import TARGET, VARIANTS

HOLDS, FAILS, UNCLEAR = "holds here", "does not hold here", "not clear here"
_DYNAMIC = "Dynamic MoE"
_DTOP_P = "DTop-p"


class Verdict(NamedTuple):
    """One of the three words, and the numbers behind it."""

    word: str
    numbers: str


class Claim(NamedTuple):
    """What a paper says, what it saw, and how this study looks at it."""

    paper: str
    text: str
    they_saw: str
    needs: tuple[str, ...]  # variants
    look: Callable[[Results], Verdict]
    analyzed: str | None = None  # the variant whose analysis it needs


def _verdict(is_so: bool | None) -> str:
    return UNCLEAR if is_so is None else HOLDS if is_so else FAILS


def _title(variant: str) -> str:
    return VARIANTS[variant].title


def _losses(first: str, second: str, compared: Comparison) -> str:
    return (
        f"validation loss {compared.first:.4f} ({_title(first)}) and {compared.second:.4f} "
        f"({_title(second)}): {compared.difference:+.4f} ± {compared.error:.4f}"
    )


def _lower(first: str, *others: str) -> Callable[[Results], Verdict]:
    """The first variant has a lower validation loss than each of the others."""

    def look(results: Results) -> Verdict:
        compared = [results.compare(first, other) for other in others]
        words = [each.is_lower for each in compared]
        is_so = False if False in words else None if None in words else True
        texts = [_losses(first, other, each) for other, each in zip(others, compared, strict=True)]
        return Verdict(_verdict(is_so), "; ".join(texts))

    return look


def _fewer_and_better(results: Results) -> Verdict:
    compared = results.compare("top_p_04", "top2")
    experts = results.mean("top_p_04", "validation_experts_per_token")
    is_so = compared.is_lower if experts < TARGET else False
    return Verdict(
        _verdict(is_so), f"{experts:.2f} experts; " + _losses("top_p_04", "top2", compared)
    )


def _count_falls(results: Results) -> Verdict:
    curves = [row["curve"]["experts"] for row in results.rows["top_p_04"]]
    first = [max(curve[: len(curve) // 5]) for curve in curves]
    last = [curve[-1] for curve in curves]
    is_so = all(end < begin for begin, end in zip(first, last, strict=True))
    texts = [f"{begin:.2f} to {end:.2f}" for begin, end in zip(first, last, strict=True)]
    return Verdict(_verdict(is_so), "from the most in the first fifth: " + ", ".join(texts))


def _dynamic_loss(results: Results) -> Verdict:
    without = "top_p_04_no_dynamic_loss"
    compared = results.compare("top_p_04", without)
    counts = results.compare("top_p_04", without, "validation_experts_per_token")
    words = (compared.is_lower, counts.is_lower)
    is_so = False if False in words else None if None in words else True
    return Verdict(
        _verdict(is_so),
        f"{counts.first:.2f} experts with and {counts.second:.2f} without; "
        + _losses("top_p_04", without, compared),
    )


def _sources(results: Results) -> Verdict:
    by_source = _analysis(results, "top_p_04")["experts_by_source"]
    low, high = min(by_source.values()), max(by_source.values())
    texts = ", ".join(f"{name} {value:.2f}" for name, value in by_source.items())
    return Verdict(HOLDS if high / low > 1.02 else FAILS, f"{texts} (holds if over 2 % apart)")


def _more_in(bottom: bool, variant: str) -> Callable[[Results], Verdict]:
    """The bottom half of the layers uses more, or fewer, experts than the top half."""

    def look(results: Results) -> Verdict:
        rows = results.rows[variant]
        halves = []
        for row in rows:
            layers = row["experts_by_layer"]
            half = len(layers) // 2
            halves.append((sum(layers[:half]) / half, sum(layers[-half:]) / half))
        words = {(low > high) is bottom for low, high in halves}
        texts = [" ".join(f"{value:.2f}" for value in row["experts_by_layer"]) for row in rows]
        word = UNCLEAR if len(words) > 1 else _verdict(words.pop())
        return Verdict(word, "experts from the bottom up: " + "; ".join(texts))

    return look


def _words(results: Results) -> Verdict:
    found = _analysis(results, "top_p_04")
    most, fewest = found["words_among_most"], found["words_among_fewest"]
    if most is None or fewest is None or found["frequent_tokens"] < 200:
        return Verdict(UNCLEAR, f"only {found['frequent_tokens']} tokens are frequent enough")
    return Verdict(
        _verdict(most < fewest),
        f"{most:.0%} among the 100 with most ({' '.join(found['most'])}), {fewest:.0%} among the "
        f"100 with fewest ({' '.join(found['fewest'])})",
    )


def _harder(results: Results) -> Verdict:
    found = _analysis(results, "top_p_04")["correlation_with_loss"]
    if found["value"] is None or found["low"] is None:
        return Verdict(UNCLEAR, "no interval could be taken")
    is_so = None if found["low"] <= 0 <= found["high"] else found["value"] > 0
    return Verdict(
        _verdict(is_so),
        f"rank correlation of a token's experts and its loss {found['value']:.3f} "
        f"({found['low']:.3f} to {found['high']:.3f})",
    )


def _post_hoc(results: Results) -> Verdict:
    points = results.content["post_hoc"]
    texts, worse = [], []
    for own in (point for point in points if point["threshold"] is None):
        others = [
            point
            for point in points
            if point["seed"] == own["seed"] and point["threshold"] is not None
        ]
        calibrated = others[-1]
        worse.append(calibrated["loss"] > own["loss"])
        texts.append(
            f"own routing {own['loss']:.4f}; "
            + ", ".join(f"{point['experts']:.2f}: {point['loss']:.4f}" for point in others)
        )
    is_so = True if all(worse) else None if any(worse) else False
    return Verdict(_verdict(is_so), "loss at so many experts, by seed: " + "; ".join(texts))


def _throughput(results: Results) -> Verdict:
    compared = results.compare("top_p_04", "top2", "processor_seconds_per_step")
    return Verdict(
        _verdict(compared.is_lower),
        f"{compared.first:.3f} s of the processor a step against {compared.second:.3f} s "
        f"± {compared.error:.3f} s "
        f"with {results.mean('top_p_04', 'experts_per_token'):.2f} experts at the end",
    )


def _locks(results: Results) -> Verdict:
    rows = results.rows["dtop_p"]
    reached = [row["steps_to_target"] for row in rows]
    fixed = [
        f"{row['fewest_experts_per_token']:.2f} to {row['most_experts_per_token']:.2f}"
        for row in results.rows["fixed_020"]
    ]
    texts = [
        "never reached"
        if row["steps_to_target"] is None
        else f"step {row['steps_to_target']}, then at worst {row['worst_excursion']:.1%} off"
        for row in rows
    ]
    return Verdict(
        _verdict(all(step is not None and step <= row["steps"] / 5 for step, row in
                     zip(reached, rows, strict=True))),
        f"{'; '.join(texts)}; fixed top-p 0.2 after the first fifth: {', '.join(fixed)} "
        "(holds if reached within the first fifth)",
    )  # fmt: skip


def _sensitive(results: Results) -> Verdict:
    low = results.mean("fixed_020", "validation_experts_per_token")
    high = results.mean("fixed_030", "validation_experts_per_token")
    return Verdict(
        _verdict(high > 1.2 * low),
        f"{low:.2f} experts at 0.2 and {high:.2f} at 0.3 (holds if over 20 % more)",
    )


def _by_layer(results: Results) -> Verdict:
    (row,) = results.rows["by_layer"]
    worst = max(abs(value / TARGET - 1) for value in row["experts_by_layer"])
    compared = results.compare("dtop_p", "by_layer")
    words = (worst <= 0.02, compared.is_lower)
    is_so = False if False in words else None if None in words else True
    return Verdict(
        _verdict(is_so),
        f"at the end no layer is more than {worst:.1%} off; "
        + _losses("dtop_p", "by_layer", compared),
    )


def _analysis(results: Results, variant: str) -> dict[str, Any]:
    return next(item for item in results.content["analysis"] if item["variant"] == variant)


CLAIMS = (
    Claim(_DYNAMIC, "Experts beat a dense model of equal active size.",
          "Top-2 41.6, dense of 570 M 39.4 (average of five tasks)",
          ("top2", "dense"), _lower("top2", "dense")),
    Claim(_DYNAMIC, "Two experts beat one.", "Top-2 41.6, top-1 40.5",
          ("top2", "top1"), _lower("top2", "top1")),
    Claim(_DYNAMIC, "Top-p 0.4 beats top-2 with fewer experts.",
          "42.3 with 1.8 experts, top-2 41.6", ("top_p_04", "top2"), _fewer_and_better),
    Claim(_DYNAMIC, "The number of experts falls during training.",
          "below 2 after 60 B of 100 B tokens (Figure 2)", ("top_p_04",), _count_falls),
    Claim(_DYNAMIC, "Without the dynamic loss more experts do worse.",
          "2.0 instead of 1.8 experts, 40.0 instead of 42.8 (Table 8)",
          ("top_p_04", "top_p_04_no_dynamic_loss"), _dynamic_loss),
    Claim(_DYNAMIC, "Sources need different numbers of experts.",
          "1.73 (books) to 1.90 (arXiv) (Table 2)", ("top_p_04",), _sources, "top_p_04"),
    Claim(_DYNAMIC, "Bottom layers need more experts.",
          "up to 4 at the bottom, 1 at the top (Figure 3)",
          ("top_p_04",), _more_in(True, "top_p_04")),
    Claim(_DYNAMIC, "Tokens that use most experts are seldom complete words.",
          "10 of 100, against 51 of 100 with fewest (Table 6)", ("top_p_04",), _words, "top_p_04"),
    Claim(_DYNAMIC, "Harder input needs more experts.",
          "BBH 1.87, other tasks 1.72 to 1.76 (Table 3); here: a token's own loss",
          ("top_p_04",), _harder, "top_p_04"),
    Claim(_DYNAMIC, "Top-2 with a threshold after the fact is worse at 2 experts.",
          "40.3 at 1.9 experts instead of 41.6; 42.1 at 2.8, 42.8 at 3.9 (Table 7)",
          ("top2",), _post_hoc),
    Claim(_DYNAMIC, "Training is faster than with top-2.",
          "98.5 instead of 93.9 thousand tokens/s (Table 4, at the end of training)",
          ("top_p_04", "top2"), _throughput),
    Claim(_DTOP_P, "DTop-p beats top-k and fixed top-p.",
          "50.9, top-k 49.0, fixed top-p 49.3 (average of 13 tasks)",
          ("dtop_p", "top2", "fixed_020"), _lower("dtop_p", "top2", "fixed_020")),
    Claim(_DTOP_P, "The count locks to its target early; a fixed threshold drifts.",
          "locked within 1 B of 100 B tokens", ("dtop_p", "fixed_020"), _locks),
    Claim(_DTOP_P, "With a fixed threshold the count depends much on its value.",
          "8 experts at 0.35, more than 12 at 0.40", ("fixed_020", "fixed_030"), _sensitive),
    Claim(_DTOP_P, "Controller and normalization are both needed.",
          "either alone is worse (no figures at hand)",
          ("dtop_p", "no_drn", "no_controller"), _lower("dtop_p", "no_drn", "no_controller")),
    Claim(_DTOP_P, "Shallow layers use fewer experts, deep ones more.", "so (no figures at hand)",
          ("dtop_p",), _more_in(False, "dtop_p")),
    Claim(_DTOP_P, "By layer, every layer holds its target, and the loss is slightly worse.",
          "so (no figures at hand)", ("dtop_p", "by_layer"), _by_layer),
)  # fmt: skip


def judge(claim: Claim, results: Results) -> Verdict | None:
    """What the results say, or None while a variant that it needs is missing."""
    if not all(len(results.rows.get(name, ())) == VARIANTS[name].num_seeds for name in claim.needs):
        return None
    analyzed = {item["variant"] for item in results.content["analysis"]}
    if claim.analyzed not in analyzed | {None}:
        return None
    return claim.look(results)
