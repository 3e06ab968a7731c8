"""The papers' claims: what the papers saw, and what the results of this study say about each.

A difference counts if it is larger than two standard errors. Between variants the error comes from
the spread over seeds, pooled over all variants that have several; within a variant it comes from
the spread of the difference over its seeds. A claim that is tested on a single model has a margin
of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron_dynmoe.analysis.results.statistics import EXTREMES
from study.results import TOLERANCE, Comparison, Results, paired, percent
from study.variants import TARGET, VARIANTS

APART = 0.02  # if sources differ by more, they count as different
EARLY = 1 / 5  # a target that is reached within this share of the training is reached early
DRIFT = 0.05  # if a count moves by a larger share, it drifts
SENSITIVE = 1.2  # a higher threshold has to give this many times the count

HOLDS, FAILS, UNCLEAR = "holds here", "does not hold here", "not clear here"
_DYNAMIC = "Dynamic MoE"
_DTOP_P = "DTop-p"


class Verdict(NamedTuple):
    """One of the three verdicts, and the numbers behind it."""

    word: str
    numbers: str


class Claim(NamedTuple):
    """What a paper says, what it saw, and how this study tests it."""

    paper: str
    text: str
    they_saw: str
    needs: tuple[str, ...]  # variants
    look: Callable[[Results], Verdict]
    analyzed: str | None = None  # the variant whose analysis it needs
    plain: bool = False  # whether it is a plain correlation, which the part influences looks into
    at_equal_counts: bool = False  # whether a later claim tests the same at equal counts


def _verdict(is_so: bool | None) -> str:
    return UNCLEAR if is_so is None else HOLDS if is_so else FAILS


def _title(variant: str) -> str:
    return VARIANTS[variant].title


def every(words: Sequence[bool | None]) -> bool | None:
    """Whether every part of a claim holds; None if that is not clear."""
    return False if False in words else None if None in words else True


def _same(words: Sequence[bool]) -> bool | None:
    """The answer on which all seeds agree, or None."""
    return words[0] if len(set(words)) == 1 else None


def _losses(results: Results, first: str, second: str, compared: Comparison) -> str:
    sides = [
        f"{loss:.4f} ({_title(name)}; {_cost(results, name)})"
        for name, loss in ((first, compared.first), (second, compared.second))
    ]
    difference = f"{compared.difference:+.4f} ± {compared.error:.4f}"
    return f"validation loss {' and '.join(sides)}: {difference}"


def _cost(results: Results, variant: str) -> str:
    """What a variant's loss cost: experts per token, and operations in experts."""
    flops = f"{results.mean(variant, 'expert_flops') / 1e12:,.1f} TFLOP"
    experts = results.experts(variant)
    return f"{statistics.fmean(experts):.2f} experts, {flops}" if experts else flops


def _lower(first: str, *others: str) -> Callable[[Results], Verdict]:
    """The first variant has a lower validation loss than each of the others."""

    def look(results: Results) -> Verdict:
        compared = [results.compare(first, other) for other in others]
        texts = [
            _losses(results, first, other, each)
            for other, each in zip(others, compared, strict=True)
        ]
        return Verdict(_verdict(every([each.is_lower for each in compared])), "; ".join(texts))

    return look


def _fewer_and_better(results: Results) -> Verdict:
    compared = results.compare("top_p_04", "top2")
    experts = results.experts("top_p_04")
    fewer = paired(experts, [TARGET] * len(experts))
    return Verdict(
        _verdict(every([fewer.is_lower, compared.is_lower])),
        f"{fewer.first:.2f} ± {fewer.error:.2f} experts; "
        + _losses(results, "top_p_04", "top2", compared),
    )


def _fifth(row: dict[str, Any], number: int) -> float:
    """Mean experts per token over a fifth of a training, from 0."""
    curve = row["curve"]["experts"]
    return statistics.fmean(curve[len(curve) * number // 5 : len(curve) * (number + 1) // 5])


def _count_falls(results: Results) -> Verdict:
    rows = results.rows["top_p_04"]
    compared = paired([_fifth(row, 4) for row in rows], [_fifth(row, 0) for row in rows])
    return Verdict(
        _verdict(compared.is_lower),
        f"{compared.second:.2f} experts on average in the first fifth, {compared.first:.2f} in the "
        f"last: {compared.difference:+.2f} ± {compared.error:.2f}",
    )


def _dynamic_loss(results: Results) -> Verdict:
    without = "top_p_04_no_dynamic_loss"
    compared = results.compare("top_p_04", without)
    counts = results.compare("top_p_04", without, "validation_experts_per_token")
    return Verdict(
        _verdict(every([compared.is_lower, counts.is_lower])),
        f"{counts.difference:+.2f} ± {counts.error:.2f} experts; "
        + _losses(results, "top_p_04", without, compared),
    )


def _sources(results: Results) -> Verdict:
    by_source = _analysis(results, "top_p_04")["experts_by_source"]
    low, high = min(by_source.values()), max(by_source.values())
    texts = ", ".join(f"{name} {value:.2f}" for name, value in by_source.items())
    return Verdict(
        _verdict(high > (1 + APART) * low), f"{texts} (holds if over {percent(APART, 0)} apart)"
    )


def _more_in(bottom: bool, variant: str) -> Callable[[Results], Verdict]:
    """The bottom half of the layers uses more, or fewer, experts than the top half."""

    def look(results: Results) -> Verdict:
        low, high, texts = [], [], []
        for row in results.rows[variant]:
            layers = row["experts_by_layer"]
            half = len(layers) // 2
            low.append(statistics.fmean(layers[:half]))
            high.append(statistics.fmean(layers[-half:]))
            texts.append(" ".join(f"{value:.2f}" for value in layers))
        compared = paired(high, low) if bottom else paired(low, high)
        halves = ("upper", "lower") if bottom else ("lower", "upper")
        return Verdict(
            _verdict(compared.is_lower),
            f"experts from the bottom up, by seed: {'; '.join(texts)}; {halves[0]} half less "
            f"{halves[1]} half {compared.difference:+.2f} ± {compared.error:.2f}",
        )

    return look


def _words(results: Results) -> Verdict:
    found = _analysis(results, "top_p_04")
    most, fewest = found["words_among_most"], found["words_among_fewest"]
    if most is None or fewest is None or found["frequent_tokens"] < 2 * EXTREMES:
        return Verdict(UNCLEAR, f"only {found['frequent_tokens']} tokens are frequent enough")
    # Two standard errors of the difference of two shares, each among this many tokens
    error = 2 * ((most * (1 - most) + fewest * (1 - fewest)) / EXTREMES) ** 0.5
    compared = Comparison(most, fewest, error)
    return Verdict(
        _verdict(compared.is_lower),
        f"{percent(most, 0)} among the {EXTREMES} with most, {percent(fewest, 0)} among as many "
        f"with fewest (counts if over {percent(error, 0)} apart)",
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
    texts, calibrated, own = [], [], []
    for row in results.rows["top2"]:
        mine = [point for point in points if point["seed"] == row["seed"]]
        (trained,) = (point for point in mine if point["threshold"] is None)
        others = [point for point in mine if point["threshold"] is not None]
        own.append(trained["loss"])
        calibrated.append(others[-1]["loss"])  # the one that gives 2 experts
        texts.append(
            f"own routing {trained['loss']:.4f}; "
            + ", ".join(f"{point['experts']:.2f}: {point['loss']:.4f}" for point in others)
        )
    compared = paired(own, calibrated)
    return Verdict(
        _verdict(compared.is_lower),
        f"loss at so many experts, by seed: {'; '.join(texts)}; own routing less the threshold "
        f"for {TARGET:g} {compared.difference:+.4f} ± {compared.error:.4f}",
    )


def _throughput(results: Results) -> Verdict:
    compared = results.compare("top_p_04", "top2", "processor_seconds_per_step")
    return Verdict(
        _verdict(compared.is_lower),
        f"{compared.first:.3f} s of the processor a step against {compared.second:.3f} s "
        f"(± {compared.error:.3f}) "
        f"with {results.mean('top_p_04', 'experts_per_token'):.2f} experts at the end",
    )


def _locks(results: Results) -> Verdict:
    held, texts = [], []
    for row in results.rows["dtop_p"]:
        step, peak = row["held_from_step"], percent(row["peak_excursion"])
        held.append(step is not None and step <= EARLY * row["steps"])
        texts.append(
            f"never ({peak} off)"
            if step is None
            else f"from step {step}, then {percent(row['worst_excursion'])} off at most ({peak} in "
            "the whole run)"
        )
    moved = {
        name: [abs(_fifth(row, 4) / _fifth(row, 1) - 1) for row in results.rows[name]]
        for name in ("fixed_020", "dtop_p")
    }
    drifts = _same([drift > max(DRIFT, *moved["dtop_p"]) for drift in moved["fixed_020"]])
    drifted = {name: ", ".join(percent(drift) for drift in moved[name]) for name in moved}
    return Verdict(
        _verdict(every([_same(held), drifts])),
        f"held {'; '.join(texts)}: {_verdict(_same(held))} if early is the first fifth; from the "
        f"second fifth to the last the count moves by {drifted['fixed_020']} with the threshold "
        f"fixed at 0.2, by {drifted['dtop_p']} with DTop-p: {_verdict(drifts)} if drifting is "
        f"more than {percent(DRIFT, 0)} and than any of DTop-p",
    )


def _sensitive(results: Results) -> Verdict:
    low, high = (statistics.fmean(results.experts(name)) for name in ("fixed_020", "fixed_030"))
    return Verdict(
        _verdict(high > SENSITIVE * low),
        f"{low:.2f} experts at 0.2 and {high:.2f} at 0.3 (holds if over "
        f"{percent(SENSITIVE - 1, 0)} more)",
    )


def _by_layer(results: Results) -> Verdict:
    (row,) = results.rows["by_layer"]
    worst = max(abs(value / TARGET - 1) for value in row["experts_by_layer"])
    compared = results.compare("dtop_p", "by_layer")
    return Verdict(
        _verdict(every([worst <= TOLERANCE, compared.is_lower])),
        f"at the end no layer is more than {percent(worst)} off (held: within "
        f"{percent(TOLERANCE, 0)}); " + _losses(results, "dtop_p", "by_layer", compared),
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
          ("top_p_04",), _harder, "top_p_04", plain=True),
    Claim(_DYNAMIC, "Top-2 with a threshold after the fact is worse at 2 experts.",
          "40.3 at 1.9 experts instead of 41.6; 42.1 at 2.8, 42.8 at 3.9 (Table 7)",
          ("top2",), _post_hoc),
    Claim(_DYNAMIC, "Training is faster than with top-2.",
          "98.5 instead of 93.9 thousand tokens/s (Table 4, at the end of training)",
          ("top_p_04", "top2"), _throughput),
    Claim(_DTOP_P, "DTop-p beats top-k and fixed top-p.",
          "50.9, top-k 49.0, fixed top-p 49.3 (average of 13 tasks)",
          ("dtop_p", "top2", "fixed_020"), _lower("dtop_p", "top2", "fixed_020"),
          at_equal_counts=True),
    Claim(_DTOP_P, "The count locks to its target early; a fixed threshold drifts.",
          "locked within 1 B of 100 B tokens", ("dtop_p", "fixed_020"), _locks),
    Claim(_DTOP_P, "With a fixed threshold the count depends much on its value.",
          "8 experts at 0.35, more than 12 at 0.40", ("fixed_020", "fixed_030"), _sensitive),
    Claim(_DTOP_P, "Controller and normalization are both needed.",
          "either alone is worse (no figures at hand)",
          ("dtop_p", "no_drn", "no_controller"), _lower("dtop_p", "no_drn", "no_controller"),
          at_equal_counts=True),
    Claim(_DTOP_P, "Shallow layers use fewer experts, deep ones more.", "so (no figures at hand)",
          ("dtop_p",), _more_in(False, "dtop_p")),
    Claim(_DTOP_P, "By layer, every layer holds its target, and the loss is slightly worse.",
          "so (no figures at hand)", ("dtop_p", "by_layer"), _by_layer, at_equal_counts=True),
)  # fmt: skip


def judge(claim: Claim, results: Results) -> Verdict | None:
    """What the results say, or None if a variant that the claim needs is missing."""
    if not all(len(results.rows.get(name, ())) == VARIANTS[name].num_seeds for name in claim.needs):
        return None
    analyzed = {item["variant"] for item in results.content["analysis"]}
    if claim.analyzed not in analyzed | {None}:
        return None
    return claim.look(results)
