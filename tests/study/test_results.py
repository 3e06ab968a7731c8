"""The statistics by which the study compares runs: what they estimate, and what intervals hold."""

import math

import numpy as np
import pytest

from study import results


def test_noise_beside_seeds_is_what_a_regression_leaves():
    """Against least squares with a constant for each variant and each seed of each group."""
    random = np.random.default_rng(4)
    groups = [dict.fromkeys(range(1, 4), 0.0) for _ in range(3)]
    groups += [dict.fromkeys((2, 3), 0.0) for _ in range(2)] + [{1: 9.0}]
    for group in groups[:5]:
        for seed in group:
            group[seed] = 10 * seed + random.normal()
    rows, values = [], []
    for number, group in enumerate(groups[:5]):
        for seed, value in group.items():
            row = np.zeros(5 + 2 * 4)
            row[number] = row[5 + 4 * (number > 2) + seed] = 1
            rows.append(row)
            values.append(value)
    design = np.array(rows)
    _, _, rank, _ = np.linalg.lstsq(design, values)
    residuals = values - design @ np.linalg.lstsq(design, values)[0]
    noise = results.noise_beside_seeds(dict(zip("abcdef", groups, strict=True)))
    assert noise.freedom == len(values) - rank == 5 and not noise.apart
    assert noise.deviation == pytest.approx(math.sqrt((residuals**2).sum() / 5))
    assert results.noise_beside_seeds({"a": {1: 1.0, 2: 2.0}, "b": {1: 3.0}}) is None


def test_intervals_hold_what_they_say():
    """Over many studies of three seeds, whose effect is large, they hold the difference in 95 %."""
    random, held, studies = np.random.default_rng(1), 0, 400
    for _ in range(studies):
        of_seeds = random.normal(scale=3.0, size=3)
        groups = {
            str(level): dict(enumerate(of_seeds + level + random.normal(size=3), 1))
            for level in (0, 5, 2, 2.5)
        }
        noise = results.noise_beside_seeds(groups)
        found = results.compared_by_seed(groups, "5", "0", noise)
        held += abs(found.difference - 5) <= found.error
    assert 0.92 < held / studies < 0.98


def test_a_variant_with_noise_of_its_own_blurs_no_other():
    """One of six has noise of 15 times the others': all pairs' intervals hold what they say."""
    random, studies = np.random.default_rng(2), 400
    variants = {"a": (0, 1), "b": (5, 1), "c": (2, 1), "d": (2, 1), "e": (3, 1), "wild": (1, 15)}
    held, widths = {"b": 0, "wild": 0}, {"b": 0.0, "wild": 0.0}
    for _ in range(studies):
        of_seeds = random.normal(scale=3.0, size=3)
        found = {
            name: dict(enumerate(of_seeds + level + random.normal(scale=scale, size=3), 1))
            for name, (level, scale) in variants.items()
        }
        noise = results.noise_beside_seeds(found)
        for name in held:
            compared = results.compared_by_seed(found, name, "a", noise)
            held[name] += abs(compared.difference - variants[name][0]) <= compared.error
            widths[name] += compared.error / studies
    assert all(0.92 < number / studies < 0.99 for number in held.values()), held
    assert widths["b"] < 3 < 20 < widths["wild"], widths  # of equal noise: 2.31 sqrt(2 / 3)


def test_a_variant_stands_apart_only_where_chance_makes_it_so_rarely():
    """Wherever it stands among the others; a pair of which it is one needs two seeds."""
    random = np.random.default_rng(3)
    alike = {name: dict(enumerate(random.normal(size=3), 1)) for name in "abcdefgh"}
    known = results.noise_beside_seeds(alike)
    assert known.freedom == 14 and not known.apart
    wild = {"wild": {1: 40.0, 2: -30.0, 3: -10.0}}
    for found in (wild | alike, alike | wild):
        noise = results.noise_beside_seeds(found)
        assert noise == known._replace(apart=frozenset(wild))
    found["b"] = {2: 1.0}
    assert math.isinf(results.compared_by_seed(found, "wild", "b", noise).error)
    assert not math.isinf(results.compared_by_seed(found, "a", "b", noise).error)
    mild = results.noise_beside_seeds(alike | {"mild": {1: 2.0, 2: -1.0, 3: -1.0}})
    assert mild.freedom == 16 and not mild.apart


def test_a_verdict_at_the_edge_says_so():
    words = [
        results.Comparison(0.0, second, 0.1).verdict("better", "worse")
        for second in (0.2, 0.11, 0.105, 0.099, -0.105, -0.2)
    ]
    barely = "better, barely"
    assert words == ["better", barely, barely, "not clear", "worse, barely", "worse"]


def test_pairs_of_a_seed_have_an_interval_by_students_distribution():
    first, second = [1.0, 2.0, 4.0], [0.5, 1.25, 3.0]  # differences 0.5, 0.75, 1.0
    assert results.paired(first, second).error == pytest.approx(2 * 0.25 / math.sqrt(3))
    by_student = results.paired(first, second, by_student=True)
    assert by_student.error == pytest.approx(4.3027 * 0.25 / math.sqrt(3), rel=1e-4)
    assert math.isinf(results.paired([1.0], [2.0], by_student=True).error)


@pytest.mark.parametrize("errors", [(math.inf,) * 3, (0.1, 0.1, math.inf), (0.1, 0.1, 5.0)])
def test_the_picture_of_rules_shows_all_dots_whatever_is_known_of_the_noise(
    monkeypatch, tmp_path, errors
):
    from study import figures

    names = list(figures.rules.VARIANTS)[:3]
    shown = {
        name: results.Comparison(place, 0.0, error)
        for place, (name, error) in enumerate(zip(names, errors, strict=True))
    }
    monkeypatch.setattr(figures.rules, "differences", lambda rows, of_main: shown)
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    figures.draw_rules({}, None, tmp_path)
    low, high = drawn[0].axes[0].get_xlim()
    assert -1.5 < low < 0 and 2 < high < 3.5
