"""Computes the numbers of the results from the counts; pure arithmetic.

Letters of dimensions are those of counts.py, and G groups.
"""

from __future__ import annotations

from itertools import pairwise
from math import lgamma
from typing import Any

import numpy as np

from megatron_dynmoe.analysis.counting.counts import (
    LOSS_UNIT,
    RoutingCounts,
    add_up,
    expert_bins,
    loss_of_bin,
)
from megatron_dynmoe.analysis.results.partial import partial_correlations

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
RESAMPLES = 500
SEED = 20240312
# With fewer documents one cannot tell how much documents differ.
MIN_DOCUMENTS = 20
# How many tokens are listed at either end, as in Dynamic MoE's Table 6
EXTREMES = 100


def summarize(
    groups: dict[str, RoutingCounts],
    moe_layers: list[int],
    token_texts: dict[int, str],
    min_count: int,
) -> dict[str, Any]:
    """All numbers that follow from the counts; a number that is not defined is None.

    Args:
        groups: at least one group.
        moe_layers: the number of each MoE layer in the model, from 1.
        token_texts: the text of every id that was counted.
        min_count: how often a token has to appear to be among the extremes.
    """
    total = add_up(groups)
    return {
        "all": _of_tokens(total),
        "groups": {name: _of_tokens(counts) for name, counts in groups.items()},
        "layers": _of_layers(total, groups, moe_layers),
        "experts": _of_experts(total, groups, moe_layers),
        "positions": _of_positions(total),
        "influences": partial_correlations(
            total, moe_layers, with_interval=total.documents >= MIN_DOCUMENTS
        ),
        "experts_by_loss": {
            "own": experts_by_loss(total, total.own_loss_BKN),
            "next": experts_by_loss(total, total.next_loss_BKN),
        },
        "tokens": extreme_tokens(total, token_texts, min_count),
    }


def _of_tokens(counts: RoutingCounts) -> dict[str, Any]:
    layers = counts.shape.layers
    experts = distribution(counts.total_K)
    return {
        "documents": counts.documents,
        "windows": counts.windows,
        "tokens": counts.tokens,
        "loss": counts.loss * LOSS_UNIT / counts.predicted if counts.predicted else None,
        "guessing_loss": guessing_loss(counts.vocab_V),
        # Of a token's mean over the layers
        "experts_per_token": {name: value / layers for name, value in experts.items()},
        # Of a token in one layer, as Figure 3 of Dynamic MoE and DTop-p count
        "experts_per_token_and_layer": distribution(counts.experts_LK.sum(axis=0)),
        "rank_correlation": {
            "own_loss": correlation(counts.own_loss_BKN, counts.documents),
            "next_loss": correlation(counts.next_loss_BKN, counts.documents),
        },
    }


def guessing_loss(vocab_V: np.ndarray) -> float:
    """Nats per token of a guess of each token by how often it has appeared so far in the text.

    Every token of the vocabulary starts with half a count (Krichevsky and Trofimov's estimate). The
    result does not depend on the order of the tokens, falls from ln V to the entropy of the counts
    as a text gets longer, and needs no model. A model with a larger loss has learned nothing about
    these tokens.
    """
    tokens, size = int(vocab_V.sum()), len(vocab_V)
    counts, times = np.unique(vocab_V[vocab_V > 0], return_counts=True)
    gain = sum(
        time * (lgamma(count + 0.5) - lgamma(0.5))
        for count, time in zip(counts.tolist(), times.tolist(), strict=True)
    )
    return (lgamma(tokens + size / 2) - lgamma(size / 2) - gain) / tokens


def distribution(histogram_K: np.ndarray) -> dict[str, float]:
    """Mean, population standard deviation, percentiles and extremes of a histogram of 0 .. K-1."""
    values = np.arange(len(histogram_K))
    number = histogram_K.sum()
    mean = float(values @ histogram_K) / number
    variance = float(values**2 @ histogram_K) / number - mean**2
    upto_K = histogram_K.cumsum()
    present = np.flatnonzero(histogram_K)
    return {
        "mean": mean,
        "std": max(variance, 0.0) ** 0.5,
        # The smallest value that this share of the tokens does not exceed
        **{f"p{p}": float(np.searchsorted(upto_K, p / 100 * number)) for p in PERCENTILES},
        "min": float(present[0]),
        "max": float(present[-1]),
    }


def correlation(table_BKN: np.ndarray, num_documents: int) -> dict[str, Any]:
    """Spearman's rank correlation of experts with loss, and a 95 % bootstrap interval.

    The bootstrap draws bags of documents, with replacement, and not tokens, because the tokens of
    one document are alike.

    Returns:
        ``value``, ``low``, ``high``. The value is None if experts or losses are the same for every
        token, the interval is None if there are fewer than MIN_DOCUMENTS documents.
    """
    value = spearman(table_BKN.sum(axis=0))
    result = {"value": value, "low": None, "high": None}
    if value is None or num_documents < MIN_DOCUMENTS:
        return result
    bags = table_BKN[table_BKN.any(axis=(1, 2))]
    generator = np.random.RandomState(SEED)  # its stream is the same in every version of NumPy
    drawn = generator.multinomial(len(bags), np.full(len(bags), 1 / len(bags)), RESAMPLES)
    tables = drawn.astype(np.float64) @ bags.reshape(len(bags), -1)
    values = [spearman(table.reshape(bags.shape[1:])) for table in tables]
    known = [value for value in values if value is not None]
    result["low"], result["high"] = (float(np.percentile(known, p)) for p in (2.5, 97.5))
    return result


def describe_correlation(found: dict[str, Any]) -> str:
    """A correlation with its interval, or the reason why there is none."""
    if found["value"] is None:
        return "not defined"
    if found["low"] is None:
        return f"{found['value']:.2f} (no interval)"
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def spearman(table_KN: np.ndarray) -> float | None:
    """The rank correlation of rows with columns, ties at their mean rank; None if undefined."""
    rows_K, columns_N = table_KN.sum(axis=1), table_KN.sum(axis=0)
    rank_K, rank_N = (_mean_ranks(counts) for counts in (rows_K, columns_N))
    spread = float(rows_K @ rank_K**2) * float(columns_N @ rank_N**2)
    return float(rank_K @ table_KN @ rank_N) / spread**0.5 if spread > 0 else None


def _mean_ranks(counts: np.ndarray) -> np.ndarray:
    """The mean rank of each value, less the mean of all ranks."""
    ranks = counts.cumsum() - (counts - 1) / 2
    return ranks - (counts.sum() + 1) / 2


def experts_by_loss(counts: RoutingCounts, table_BKN: np.ndarray) -> list[dict[str, float]]:
    """Mean experts per token by loss, over bins of loss with the same number of tokens each.

    Tokens of one fine bin stay together, so the numbers of tokens differ a little.
    """
    table_KN = table_BKN.sum(axis=0)
    tokens_N = table_KN.sum(axis=0)
    centers_K = _experts_of_bins(counts)
    wanted = tokens_N.sum() / 20
    points, members = [], []
    for number in np.flatnonzero(tokens_N):
        members.append(number)
        if tokens_N[members].sum() >= wanted:
            points.append(_point(members, table_KN, centers_K))
            members = []
    if members:
        points.append(_point(members, table_KN, centers_K))
    return points


def _point(members: list[int], table_KN: np.ndarray, centers_K: np.ndarray) -> dict[str, float]:
    tokens_K = table_KN[:, members].sum(axis=1)
    tokens = int(tokens_K.sum())
    middle = loss_of_bin(np.array(members) + 0.5) @ table_KN[:, members].sum(axis=0) / tokens
    return {
        "loss": float(middle),
        "experts": float(centers_K @ tokens_K / tokens),
        "tokens": tokens,
    }


def _experts_of_bins(counts: RoutingCounts) -> np.ndarray:
    """Mean experts per layer that a bin of experts stands for."""
    bins = expert_bins(counts.shape)
    totals = np.arange(len(bins))
    number = np.maximum(np.bincount(bins), 1)
    return np.bincount(bins, weights=totals) / number / counts.shape.layers


def _of_layers(
    total: RoutingCounts, groups: dict[str, RoutingCounts], moe_layers: list[int]
) -> list[dict[str, Any]]:
    loads_GLE = np.stack([counts.load_LE for counts in groups.values()])
    rows = []
    for index, layer in enumerate(moe_layers):
        load_E = total.load_LE[index]
        rows.append(
            {
                "layer": layer,
                "experts_per_token": distribution(total.experts_LK[index]),
                "by_group": {
                    name: distribution(counts.experts_LK[index])["mean"]
                    for name, counts in groups.items()
                },
                "load_max_over_mean": _over_mean(load_E.max(), load_E),
                "unused_experts": np.flatnonzero(load_E == 0).tolist(),
                "group_information_bits": mutual_information(loads_GLE[:, index]),
            }
        )
    return rows


def _over_mean(load: int, load_E: np.ndarray) -> float | None:
    """None in a layer that no token used an expert of, as some rules allow."""
    return float(load / load_E.mean()) if load_E.any() else None


def mutual_information(load_GE: np.ndarray) -> float | None:
    """What the expert of an assignment tells about its group, in bits.

    None for one group, or without an assignment.
    """
    if len(load_GE) < 2 or not load_GE.any():
        return None
    joint_GE = load_GE / load_GE.sum()
    apart_GE = joint_GE.sum(axis=1, keepdims=True) * joint_GE.sum(axis=0, keepdims=True)
    there = joint_GE > 0
    return max(0.0, float((joint_GE[there] * np.log2(joint_GE[there] / apart_GE[there])).sum()))


def lift(total: RoutingCounts, group: RoutingCounts) -> np.ndarray:
    """How much likelier a group's token is to use an expert than any token, [L, E].

    A group whose tokens use more experts has a larger lift on the whole. NaN for unused experts.
    """
    with np.errstate(invalid="ignore"):
        return (group.load_LE / group.tokens) / (total.load_LE / total.tokens)


def _of_experts(
    total: RoutingCounts, groups: dict[str, RoutingCounts], moe_layers: list[int]
) -> list[dict[str, Any]]:
    lifts = {name: lift(total, counts) for name, counts in groups.items()}
    rows = []
    for index, layer in enumerate(moe_layers):
        load_E, together_EE = total.load_LE[index], total.together_LEE[index]
        for expert in range(total.shape.experts):
            partners = together_EE[expert].copy()
            partners[expert] = 0
            partner = int(partners.argmax())
            used = bool(load_E[expert])
            favorite = max(groups, key=lambda name: lifts[name][index, expert])
            rows.append(
                {
                    "layer": layer,
                    "expert": expert,
                    "tokens": int(load_E[expert]),
                    "load_over_mean": _over_mean(load_E[expert], load_E),
                    "partner": partner if used and partners[partner] > 0 else None,
                    "with_partner": float(partners[partner] / load_E[expert]) if used else None,
                    "group": favorite if used and len(groups) > 1 else None,
                    "lift": float(lifts[favorite][index, expert]) if used else None,
                }
            )
    return rows


def _of_positions(total: RoutingCounts) -> list[dict[str, Any]]:
    """In at most 64 stretches of a window; positions that no window reaches are left out."""
    reached = int((total.position_S > 0).sum())
    edges = np.unique(np.linspace(0, reached, min(reached, 64) + 1).round().astype(int))
    rows = []
    for first, after in pairwise(edges):
        tokens = int(total.position_S[first:after].sum())
        mean_L = total.position_LS[:, first:after].sum(axis=1) / tokens
        rows.append(
            {
                "first": int(first),
                "last": int(after) - 1,
                "tokens": tokens,
                "experts": float(mean_L.mean()),
                "by_layer": mean_L.tolist(),
            }
        )
    return rows


def extreme_tokens(total: RoutingCounts, texts: dict[int, str], min_count: int) -> dict[str, Any]:
    """The tokens that use most and fewest experts on average, and how many are whole words.

    A token counts as a word if most of its appearances are whole words.
    """
    frequent = np.flatnonzero(total.vocab_V >= min_count)
    mean_V = total.vocab_experts_V / np.maximum(total.vocab_V, 1) / total.shape.layers
    # Ties are ordered by id, so that the order is always the same.
    order = frequent[np.argsort(-mean_V[frequent], kind="stable")]
    number = min(EXTREMES, len(order) // 2)
    result: dict[str, Any] = {"min_count": min_count, "frequent": len(frequent)}
    for name, ids in (("most", order[:number]), ("fewest", order[::-1][:number])):
        rows = [_token_row(total, int(token), texts, mean_V) for token in ids]
        words = [row["word_share"] > 0.5 for row in rows if row["word_share"] is not None]
        result[name] = rows
        result[f"words_among_{name}"] = sum(words) / len(words) if words else None
    return result


def _token_row(
    total: RoutingCounts, token: int, texts: dict[int, str], mean_V: np.ndarray
) -> dict[str, Any]:
    judged, predicted = int(total.vocab_judged_V[token]), int(total.vocab_predicted_V[token])
    return {
        "id": token,
        "text": texts.get(token, f"(id {token})"),
        "tokens": int(total.vocab_V[token]),
        "experts": float(mean_V[token]),
        "loss": float(total.vocab_loss_V[token] * LOSS_UNIT / predicted) if predicted else None,
        "word_share": float(total.vocab_word_V[token] / judged) if judged else None,
    }
