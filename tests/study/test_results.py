"""The statistics by which the study compares runs: what they estimate, and what intervals hold."""

import math

import numpy as np
import pytest

from study import results


def test_noise_beside_seeds_is_what_a_regression_leaves():
    """Against least squares with a constant for each variant and each seed of each group."""
    random = np.random.default_rng(0)
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
    noise = results.noise_beside_seeds(groups)
    assert noise.freedom == len(values) - rank == 5
    assert noise.deviation == pytest.approx(math.sqrt((residuals**2).sum() / 5))
    assert results.noise_beside_seeds([{1: 1.0, 2: 2.0}, {1: 3.0}]) is None


def test_intervals_hold_what_they_say():
    """Over many studies of three seeds, whose effect is large, they hold the difference in 95 %."""
    random, held, studies = np.random.default_rng(1), 0, 400
    for _ in range(studies):
        of_seeds = random.normal(scale=3.0, size=3)
        groups = [
            dict(enumerate(of_seeds + level + random.normal(size=3), 1)) for level in (0, 5, 2, 2)
        ]
        noise = results.noise_beside_seeds(groups)
        found = results.compared_by_seed(groups[1], groups[0], noise)
        held += abs(found.difference - 5) <= found.error
    assert 0.92 < held / studies < 0.98
