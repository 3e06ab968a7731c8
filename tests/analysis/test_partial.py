"""Partial rank correlations, against residuals of ranks of the tokens themselves."""

import numpy as np
import pytest
from scipy.stats import rankdata

from megatron_dynmoe.analysis.counting.counts import RoutingCounts, Shape
from megatron_dynmoe.analysis.counting.influences import (
    INFLUENCES,
    NUM_BAGS,
    NUM_BINS,
    Tokens,
    count,
    frequency_bins,
)
from megatron_dynmoe.analysis.results.partial import partial_correlations

E = 8
NUM_TOKENS = 4000


def by_residuals(experts_T: np.ndarray, bins_CT: np.ndarray, place: int) -> float:
    """The correlation of what is left of both after a linear fit to the ranks of the others."""
    others = [rankdata(bins_T) for i, bins_T in enumerate(bins_CT) if i != place]
    design = np.stack([np.ones(len(experts_T)), *others], axis=1)
    left = [
        values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
        for values in (rankdata(experts_T), rankdata(bins_CT[place]))
    ]
    return float(np.corrcoef(left)[0, 1])


def of(experts_LT: np.ndarray, bins_CT: np.ndarray, bag_T: np.ndarray) -> RoutingCounts:
    counts = RoutingCounts(Shape(len(experts_LT), E, 16, 10))
    tokens = Tokens(bag_T, experts_LT, bins_CT)
    count(counts.influence_DLCMQ, counts.influences_DPQQ, tokens, E)
    return counts


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    """Two layers: the first follows entropy alone, the second loss and frequency."""
    generator = np.random.default_rng(5)
    bins_CT = generator.integers(0, NUM_BINS, (len(INFLUENCES), NUM_TOKENS))
    loss, entropy, frequency = (INFLUENCES.index(n) for n in ("own_loss", "entropy", "frequency"))
    bins_CT[loss] = (bins_CT[entropy] + generator.integers(0, 12, NUM_TOKENS)).clip(0, NUM_BINS - 1)
    bins_CT[INFLUENCES.index("word_start")] %= 2
    noise_LT = generator.integers(0, 3, (2, NUM_TOKENS))
    first = bins_CT[entropy] // 6
    second = (bins_CT[loss] - bins_CT[frequency] + NUM_BINS) // 12
    experts_LT = np.stack([first, second]) + noise_LT
    return Tokens(generator.integers(0, NUM_BAGS, NUM_TOKENS), experts_LT.clip(0, E), bins_CT)


def test_they_are_those_of_the_residuals_of_rankdata(tokens: Tokens) -> None:
    rows = partial_correlations(of(tokens.experts_L, tokens.bins_C, tokens.bag), [2, 4], False)
    assert [row["layer"] for row in rows] == [2, 4]
    for row, experts_T in zip(rows, tokens.experts_L, strict=True):
        for place, name in enumerate(INFLUENCES):
            plain = np.corrcoef(rankdata(experts_T), rankdata(tokens.bins_C[place]))[0, 1]
            assert row[name]["plain"] == pytest.approx(plain, abs=1e-9)
            partial = by_residuals(experts_T, tokens.bins_C, place)
            assert row[name]["partial"] == pytest.approx(partial, abs=1e-9)
            assert row[name]["low"] is row[name]["high"] is None


def test_what_only_goes_along_with_the_cause_has_none_of_its_own(tokens: Tokens) -> None:
    counts = of(tokens.experts_L, tokens.bins_C, tokens.bag)
    first, second = partial_correlations(counts, [1, 2], with_interval=True)
    assert first["own_loss"]["plain"] > 0.5  # because it goes along with the entropy
    assert first["own_loss"]["low"] < 0 < first["own_loss"]["high"]
    assert first["entropy"]["low"] > 0.5
    assert second["own_loss"]["low"] > 0.1
    assert second["frequency"]["high"] < -0.5
    for row in (first, second):
        for name in ("position", "word_start"):
            assert row[name]["low"] < row[name]["partial"] < row[name]["high"]
            assert row[name]["high"] - row[name]["low"] == pytest.approx(
                2 * 1.96 / NUM_TOKENS**0.5, rel=0.5
            )


def test_the_interval_is_over_documents(tokens: Tokens) -> None:
    """Fifty copies of every token in the same document say nothing new."""
    counts = of(tokens.experts_L, tokens.bins_C, tokens.bag)
    rows = partial_correlations(counts, [1, 2], with_interval=True)
    counts.influence_DLCMQ *= 50
    counts.influences_DPQQ *= 50
    again = partial_correlations(counts, [1, 2], with_interval=True)
    for name in INFLUENCES:
        assert again[0][name] == pytest.approx(rows[0][name])


def test_a_constant_has_no_correlation_and_the_others_have_theirs(tokens: Tokens) -> None:
    bins_CT = tokens.bins_C.copy()
    bins_CT[INFLUENCES.index("position")] = 3
    experts_LT = np.stack([tokens.experts_L[0], np.full(NUM_TOKENS, 2)])
    first, top_k = partial_correlations(of(experts_LT, bins_CT, tokens.bag), [1, 2], True)
    nothing = dict.fromkeys(("plain", "partial", "low", "high"))
    assert first["position"] == nothing and first["entropy"]["partial"] > 0.5
    assert all(top_k[name] == nothing for name in INFLUENCES)


def test_no_token_at_all_gives_no_number() -> None:
    counts = RoutingCounts(Shape(1, E, 16, 10))
    (row,) = partial_correlations(counts, [1], with_interval=True)
    assert row["entropy"] == dict.fromkeys(("plain", "partial", "low", "high"))


def test_bins_of_frequencies_keep_their_order() -> None:
    bins = frequency_bins(np.arange(1000), 1000, 50_000)
    assert (np.diff(bins) >= 0).all() and bins[0] < bins[-1]
    assert frequency_bins(np.zeros(1), 10**12, 2)[0] == 0
    assert frequency_bins(np.full(1, 10**6), 10**6, 2)[0] == NUM_BINS - 1
