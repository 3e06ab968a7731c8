"""The arithmetic of the report, against SciPy-free definitions and by hand."""

import numpy as np
import pytest

from megatron_dynmoe.analysis.counting.counts import NUM_BAGS, RoutingCounts, Shape
from megatron_dynmoe.analysis.results.statistics import (
    MIN_DOCUMENTS,
    correlation,
    distribution,
    extreme_tokens,
    guessing_loss,
    lift,
    mutual_information,
    spearman,
    summarize,
)


def by_definition(pairs: np.ndarray) -> float:
    """Pearson's correlation of mean ranks."""

    def ranks(values: np.ndarray) -> list[float]:
        return [(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values]

    return float(np.corrcoef(ranks(pairs[:, 0]), ranks(pairs[:, 1]))[0, 1])


def table_of(pairs: np.ndarray) -> np.ndarray:
    table = np.zeros((8, 8), dtype=np.int64)
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
    return table


def test_spearman_is_the_correlation_of_mean_ranks() -> None:
    generator = np.random.default_rng(1)
    pairs = generator.integers(0, 8, (300, 2))
    pairs[:, 1] = (pairs[:, 0] + pairs[:, 1]) // 2
    found = spearman(table_of(pairs))
    assert found == pytest.approx(by_definition(pairs), abs=1e-12)


def test_spearman_of_a_constant_is_not_defined() -> None:
    assert spearman(table_of(np.array([[2, 1], [2, 5]]))) is None
    assert spearman(np.zeros((3, 3))) is None


def test_the_interval_covers_what_documents_vary() -> None:
    """Documents of copied tokens hold less information than their tokens suggest."""
    generator = np.random.default_rng(2)
    copies = 50
    alone = np.zeros((NUM_BAGS, 8, 8), dtype=np.int64)
    for bag in range(NUM_BAGS):
        alone[bag] = table_of(generator.integers(0, 8, (4, 2)))
    narrow, wide = correlation(alone, 640), correlation(alone * copies, 640)
    assert wide == pytest.approx(narrow)  # not narrower for fifty times the tokens
    assert wide["low"] < wide["value"] < wide["high"]
    expected = 2 * 1.96 / (4 * NUM_BAGS) ** 0.5  # for independent pairs
    assert wide["high"] - wide["low"] == pytest.approx(expected, rel=0.35)


def test_few_documents_give_no_interval() -> None:
    table = np.zeros((NUM_BAGS, 8, 8), dtype=np.int64)
    table[0] = np.eye(8, dtype=np.int64)
    assert correlation(table, MIN_DOCUMENTS - 1) == {
        "value": pytest.approx(1),
        "low": None,
        "high": None,
    }


def test_guessing_learns_while_it_reads() -> None:
    tokens = [3, 1, 3, 3, 0, 1, 3]
    counts, expected = np.zeros(6), 0.0
    for token in tokens:
        expected -= np.log((counts[token] + 0.5) / (counts.sum() + 0.5 * len(counts)))
        counts[token] += 1
    found = guessing_loss(np.bincount(tokens, minlength=6))
    assert found == pytest.approx(expected / len(tokens))
    one, many = (guessing_loss(times * np.array([4, 2, 1, 1])) for times in (1, 10_000))
    assert 1.75 * np.log(2) == pytest.approx(many, rel=1e-3) and many < one  # the entropy


def test_a_single_expert_has_no_partner() -> None:
    counts = RoutingCounts(Shape(1, 1, 2, 1), windows=1, tokens=2)
    for name in ("load_LE", "together_LEE", "vocab_V", "vocab_experts_V"):
        getattr(counts, name)[:] = 2
    counts.position_S[:] = counts.position_LS[:] = 1
    counts.experts_LK[0, 1] = counts.total_K[1] = 2
    (expert,) = summarize({"a": counts}, [1], {0: "x"}, 1)["experts"]
    assert (expert["partner"], expert["with_partner"]) == (None, 0.0)


def test_a_distribution_is_that_of_its_values() -> None:
    values = np.repeat([1, 2, 3, 7], [10, 70, 15, 5])
    found = distribution(np.bincount(values, minlength=9))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["std"] == pytest.approx(values.std())
    assert [found[f"p{p}"] for p in (5, 50, 95, 99)] == [1, 2, 3, 7]
    assert (found["min"], found["max"]) == (1, 7)


def test_mutual_information() -> None:
    assert mutual_information(np.array([[5, 5], [5, 5]])) == 0
    assert mutual_information(np.array([[8, 0], [0, 8]])) == pytest.approx(1)  # one bit
    assert mutual_information(np.array([[8, 0]])) is None


def test_lift_compares_with_all_text() -> None:
    shape = Shape(1, 2, 4, 5)
    one, all_text = RoutingCounts(shape), RoutingCounts(shape)
    one.tokens, all_text.tokens = 10, 40
    one.load_LE[:] = [[10, 0]]
    all_text.load_LE[:] = [[20, 0]]
    found = lift(all_text, one)
    assert found[0, 0] == 2
    assert np.isnan(found[0, 1])


def test_extreme_tokens_are_frequent_ones() -> None:
    counts = RoutingCounts(Shape(2, 4, 8, 6))
    counts.vocab_V[:] = [50, 50, 50, 50, 3, 0]
    counts.vocab_experts_V[:] = [100, 400, 200, 300, 24, 0]
    counts.vocab_judged_V[:] = 40
    counts.vocab_word_V[:] = [40, 0, 30, 19, 3, 0]
    found = extreme_tokens(counts, {i: f"t{i}" for i in range(6)}, min_count=10)
    assert [row["text"] for row in found["most"]] == ["t1", "t3"]
    assert [row["text"] for row in found["fewest"]] == ["t0", "t2"]
    assert [row["experts"] for row in found["most"]] == [4.0, 3.0]
    assert (found["words_among_most"], found["words_among_fewest"]) == (0.0, 1.0)
