"""The law of a drawn target by itself: against float64, one target, order, shares."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dynmoe.control import MapController, PIController
from megatron_dynmoe.routing.threshold_map import ordered, read
from megatron_dynmoe.settings.distribution import TargetDistribution, place_between

KNOTS = (1.0, 2.0, 4.0)
FIRST, GAINS = (0.2, 0.35, 0.6), ((0.2, 0.5), (0.15, 0.4), (0.1, 0.3))
LAW = MapController(
    KNOTS,
    tuple(PIController(16, first, *gains) for first, gains in zip(FIRST, GAINS, strict=True)),
)


def start(law: MapController = LAW) -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.tensor([law.initial_map])
    return first, torch.zeros_like(first)


def isotonic(values: list[float], weights: list[float]) -> list[float]:
    """Pool adjacent violators, in Python's floats."""
    blocks: list[list[float]] = []  # mean, weight, members
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (m1, w1, n1), (m2, w2, n2) = blocks[-2:]
            blocks[-2:] = [[(w1 * m1 + w2 * m2) / (w1 + w2), w1 + w2, n1 + n2]]
    return [mean for mean, _, members in blocks for _ in range(int(members))]


def oracle_step(sums: list[float], measured: float, target: float) -> tuple[list[float], ...]:
    """The law of docs/controller.md once more, in Python's floats."""
    weights = [0.0] * len(KNOTS)
    for k in range(len(KNOTS) - 1):
        if KNOTS[k] <= target <= KNOTS[k + 1]:
            way = math.log(target / KNOTS[k]) / math.log(KNOTS[k + 1] / KNOTS[k])
            weights[k : k + 2] = [1 - way, way]
    size = sum(weight**2 for weight in weights)
    errors = [(target - measured) / 16 * weight / size for weight in weights]
    inverse = [1 / k_i for _, k_i in GAINS]
    maps = []
    for first, (_, k_i), total, error in zip(FIRST, GAINS, sums, errors, strict=True):
        bounded = min(max(total + error, -first / k_i), (1 - first) / k_i)
        maps.append(first + k_i * bounded)
    pooled = isotonic(maps, inverse)
    sums = [(m - first) / k_i for m, first, (_, k_i) in zip(pooled, FIRST, GAINS, strict=True)]
    moved = [
        min(max(first + k_p * error + k_i * total, 0.0), 1.0)
        for first, (k_p, k_i), error, total in zip(FIRST, GAINS, errors, sums, strict=True)
    ]
    return isotonic(moved, inverse), sums


def test_agrees_with_float64() -> None:
    random = np.random.RandomState(0)
    (thresholds, integrals), sums = start(), [0.0] * 3
    pooled = 0
    for _ in range(2000):
        target, measured = float(random.uniform(1, 4)), float(random.uniform(0.2, 9))
        thresholds, integrals = LAW.step(thresholds, integrals, torch.tensor([measured]), target)
        expected, sums = oracle_step(sums, measured, target)
        assert thresholds[0].tolist() == pytest.approx(expected, abs=3e-5)
        assert integrals[0].tolist() == pytest.approx(sums, abs=1e-4)
        pooled += len(set(expected)) < 3
        sums = integrals[0].tolist()  # the projections branch: each step is compared by itself
    assert 20 < pooled < 1980


@pytest.mark.parametrize("direction", [1, -1])
def test_one_knot_is_the_law_of_one_target_to_the_last_bit(direction: int) -> None:
    one = PIController(16, 0.375, 0.133, 0.426)
    law = MapController((2.0,), (one,), direction)
    random = np.random.RandomState(1)
    threshold, integral = torch.full((3,), 0.375), torch.zeros(3)
    thresholds, integrals = threshold.unsqueeze(-1), integral.unsqueeze(-1)
    for _ in range(1000):
        measured = torch.from_numpy(random.uniform(1, 4, 3))
        measured[random.randint(3)] = math.nan if random.rand() < 0.1 else 2.0
        signed = (threshold, integral, direction * measured, direction * 2.0)
        threshold, integral = one.step(*signed)
        thresholds, integrals = law.step(thresholds, integrals, measured, 2.0)
        assert torch.equal(thresholds.squeeze(-1), threshold)
        assert torch.equal(integrals.squeeze(-1), integral)


def test_a_target_that_is_always_the_same_knot_moves_it_as_its_law_would() -> None:
    random = np.random.RandomState(2)
    threshold, integral = torch.tensor([FIRST[1]]), torch.zeros(1)
    thresholds, integrals = start()
    for _ in range(500):
        measured = torch.from_numpy(random.uniform(1.6, 2.4, 1))
        threshold, integral = LAW.laws[1].step(threshold, integral, measured, 2.0)
        thresholds, integrals = LAW.step(thresholds, integrals, measured, 2.0)
        assert torch.equal(read(thresholds, place_between(KNOTS, 2.0)), threshold)
        assert (integrals[0, 0], integrals[0, 2]) == (0, 0)


def test_the_shares_take_away_a_whole_error_at_the_target_itself() -> None:
    """With unit gains, and so equal slopes, the threshold there moves by the error itself."""
    laws = tuple(PIController(1, first, 0.0, 1.0) for first in FIRST)
    law = MapController(KNOTS, laws)
    for target in (1.0, 1.3, math.sqrt(2), 1.9, 2.0, 3.7):
        place = place_between(KNOTS, target)
        before, sums = start(law)
        after, _ = law.step(before, sums, torch.tensor([target - 0.03]), target)
        assert (read(after, place) - read(before, place)).item() == pytest.approx(0.03, abs=1e-6)


@pytest.mark.parametrize("measured", [math.nan, math.inf, -math.inf])
def test_measurement_that_is_not_finite_leaves_the_state_of_its_map(measured: float) -> None:
    before = torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.2, 0.9]]), torch.tensor([[0.1, 0, 0.2]] * 2)
    after = LAW.step(*before, torch.tensor([measured, 2.5]), 3.0)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[0], new[0])
        assert not torch.equal(old[1], new[1])


thresholds_of_knots = st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=6)


@settings(deadline=None)
@given(values=thresholds_of_knots, seed=st.integers(0, 99))
def test_order_is_the_isotonic_regression(values: list[float], seed: int) -> None:
    weights = np.random.RandomState(seed).uniform(0.1, 10, len(values)).astype(np.float32)
    given_map = torch.tensor([values, values[::-1]])
    result = ordered(given_map, torch.from_numpy(weights))
    assert (result.diff(dim=-1) >= 0).all()
    for row, expected in zip(result.tolist(), (values, values[::-1]), strict=True):
        assert row == pytest.approx(isotonic(expected, weights.tolist()), abs=1e-6)
    if values == sorted(values):
        assert torch.equal(result[0], given_map[0])


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(1, 4), st.floats(0, 16)), min_size=1, max_size=12),
    direction=st.sampled_from([1, -1]),
)
def test_the_map_never_falls_and_stays_in_its_bounds(
    steps: list[tuple[float, float]], direction: int
) -> None:
    first = FIRST if direction > 0 else FIRST[::-1]
    laws = tuple(PIController(16, one, 0.5, 2.0, 0.1, 0.9) for one in first)
    law = MapController(KNOTS, laws, direction)
    state = start(law)
    for target, measured in steps:
        state = law.step(*state, torch.tensor([measured]), target)
        thresholds, sums = state
        assert (direction * thresholds.diff(dim=-1) >= 0).all()
        assert (thresholds >= 0.1).all() and (thresholds <= 0.9).all()
        for knot, one in enumerate(laws):
            low, high = one.integral_bounds
            assert low - 1e-6 <= sums[0, knot].item() <= high + 1e-6


def test_the_knots_divide_the_range_evenly_in_its_logarithm() -> None:
    knots = TargetDistribution(1, 4).knots
    assert knots == pytest.approx([1, 2**0.5, 2, 2**1.5, 4])
    assert (knots[0], knots[-1]) == (1, 4)
    assert TargetDistribution(2, 8).place(4.0) == (2, 0.0)
    knot, way = TargetDistribution(1, 4).place(3.0)
    assert knots[knot] * (knots[knot + 1] / knots[knot]) ** way == pytest.approx(3)
    for target, place in ((0.5, (0, 0.0)), (1, (0, 0.0)), (4, (4, 0.0)), (9, (4, 0.0))):
        assert place_between(knots, target) == place
