"""The law by itself: arithmetic, bounds, anti-windup, measurements that are not finite."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dynmoe.control import PIController

LAW = PIController(
    num_experts=16,
    initial_threshold=0.375,
    proportional_gain=0.5,
    integral_gain=0.25,
    min_threshold=0.125,
    max_threshold=0.875,
)


def state(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_steps_by_hand() -> None:
    """All values are binary fractions, so the results are exact."""
    threshold, integral = state(0.375), state(0.0)
    # e = (2 - 4) / 16 = -1/8; threshold = 3/8 - 1/16 - 1/32
    threshold, integral = LAW.step(threshold, integral, state(4.0), 2.0)
    assert (threshold.item(), integral.item()) == (0.28125, -0.125)
    # e = (2 - 1) / 16 = 1/16; sum = -1/16; threshold = 3/8 + 1/32 - 1/64
    threshold, integral = LAW.step(threshold, integral, state(1.0), 2.0)
    assert (threshold.item(), integral.item()) == (0.390625, -0.0625)
    # e = 0: only the integral term stays; threshold = 3/8 - 1/64
    threshold, integral = LAW.step(threshold, integral, state(2.0), 2.0)
    assert (threshold.item(), integral.item()) == (0.359375, -0.0625)
    assert threshold.dtype == integral.dtype == torch.float32


def test_agrees_with_float64() -> None:
    """The law written down once more in float64, over 2,000 steps of random measurements."""
    random = np.random.RandomState(0)
    threshold, integral = state(0.375), state(0.0)
    reference = 0.0
    for measured in random.uniform(0.5, 3.5, 2000):
        threshold, integral = LAW.step(threshold, integral, state(measured), 2.0)
        error = (2.0 - measured) / 16
        reference = min(max(reference + error, -0.25 / 0.25), 0.5 / 0.25)
        expected = min(max(0.375 + 0.5 * error + 0.25 * reference, 0.125), 0.875)
        assert integral.item() == pytest.approx(reference, abs=2e-5)
        assert threshold.item() == pytest.approx(expected, abs=1e-5)


def test_layers_are_independent() -> None:
    thresholds, integrals = state(0.375, 0.2, 0.8), state(0.0, -0.5, 1.0)
    measured, targets = state(3.0, 1.0, math.nan), state(2.0, 2.0, 4.0)
    together = LAW.step(thresholds, integrals, measured, targets)
    for i in range(3):
        own = (x[i : i + 1] for x in (thresholds, integrals, measured, targets))
        alone = LAW.step(*own)
        assert (together[0][i], together[1][i]) == (alone[0][0], alone[1][0])


@pytest.mark.parametrize("measured", [math.nan, math.inf, -math.inf])
def test_measurement_that_is_not_finite_leaves_the_state(measured: float) -> None:
    before = state(0.3), state(-0.25)
    after = LAW.step(*before, state(measured), 2.0)
    assert (after[0].item(), after[1].item()) == (before[0].item(), before[1].item())


def test_no_token_counted_leaves_the_state() -> None:
    assignments, tokens = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    threshold, integral = LAW.step(state(0.3), state(-0.25), assignments / tokens, 2.0)
    assert (threshold.item(), integral.item()) == (state(0.3).item(), -0.25)


def test_inputs_are_not_changed_and_carry_no_gradient() -> None:
    threshold, integral = state(0.375), state(0.0)
    measured = state(3.0).requires_grad_()
    results = LAW.step(threshold, integral, measured, 2.0)
    assert (threshold.item(), integral.item()) == (0.375, 0.0)
    assert not any(result.requires_grad for result in results)


def test_float64_measurement_keeps_a_float32_state() -> None:
    results = LAW.step(state(0.375), state(0.0), state(3.0).double(), 2.0)
    assert [result.dtype for result in results] == [torch.float32] * 2


def test_without_integral_gain_nothing_is_summed() -> None:
    law = PIController(16, 0.375, 0.5, 0.0)
    threshold, integral = law.step(state(0.375), state(0.0), state(4.0), 2.0)
    assert (threshold.item(), integral.item()) == (0.3125, 0.0)


@pytest.mark.parametrize(("stuck_at", "bound"), [(16.0, 0.125), (1.0, 0.875)])
def test_saturated_threshold_leaves_its_bound_at_the_first_opposite_error(
    stuck_at: float, bound: float
) -> None:
    threshold, integral = state(0.375), state(0.0)
    for _ in range(1000):
        threshold, integral = LAW.step(threshold, integral, state(stuck_at), 2.0)
    assert threshold.item() == bound
    assert integral.item() in LAW.integral_bounds
    opposite = 1.5 if stuck_at > 2 else 2.5
    threshold, integral = LAW.step(threshold, integral, state(opposite), 2.0)
    assert abs(threshold.item() - bound) == pytest.approx((0.5 + 0.25) * 0.5 / 16)


counts = st.floats(0, 16, width=32)
sums = st.floats(*LAW.integral_bounds, width=32)


@given(integral=sums, measured=counts, target=counts)
def test_bounded_and_directed(integral: float, measured: float, target: float) -> None:
    """The state stays in its bounds; using too few experts never lowers the sum, nor too many
    raises it."""
    threshold, after = LAW.step(state(0.375), state(integral), state(measured), target)
    low, high = LAW.integral_bounds
    assert LAW.min_threshold <= threshold.item() <= LAW.max_threshold
    assert low <= after.item() <= high
    if measured <= target:
        assert after.item() >= integral
    if measured >= target:
        assert after.item() <= integral


@given(integral=sums, fewer=counts, more=counts, target=counts)
def test_threshold_falls_as_the_count_rises(
    integral: float, fewer: float, more: float, target: float
) -> None:
    fewer, more = sorted((fewer, more))
    at_fewer, _ = LAW.step(state(0.375), state(integral), state(fewer), target)
    at_more, _ = LAW.step(state(0.375), state(integral), state(more), target)
    assert at_fewer.item() >= at_more.item()


def test_a_relative_error_depends_on_no_size_and_is_bounded() -> None:
    for num_experts, target in ((8, 2.0), (64, 16.0)):
        law = PIController(num_experts, -8.0, 1.0, 0.25, -16.0, 2.0, "relative")
        # As when the count falls with the knob: both are negative, and too high a count raises it.
        knob, integral = law.step(state(-8.0), state(0.0), state(-1.5 * target), -target)
        assert (knob.item(), integral.item()) == (-8 + 0.5 + 0.125, 0.5)
        knob, integral = law.step(knob, integral, state(-4.0 * target), -target)
        assert (knob.item(), integral.item()) == (-8 + 1 + 0.375, 1.5)
        knob, integral = law.step(knob, integral, state(0.0), -target)
        assert (knob.item(), integral.item()) == (-8 - 1 + 0.125, 0.5)


def test_the_sign_of_the_error_moves_the_knob_by_the_same_amount() -> None:
    law = PIController(8, -8.0, 0.0, 0.25, -8.5, 2.0, "sign")
    knob, integral = state(-8.0, -8.0, -8.0), state(0.0, 0.0, 0.0)
    knob, integral = law.step(knob, integral, state(-2.1, -2.0, -0.1), -2.0)
    assert knob.tolist() == [-7.75, -8.0, -8.25]
    for _ in range(3):
        knob, integral = law.step(knob, integral, state(-8.0, -2.0, 0.0), -2.0)
    assert knob.tolist() == [-7.0, -8.0, -8.5] and integral.tolist() == [4, 0, -2]
