"""The law against plants drawn at random: slope, noise, delay, drift, saturation, staircases.

A plant here is a curve of the count over the threshold, not a router: what the law must stand does
not depend on where the curve comes from. 32 plants of one kind are run at once, as the lanes of one
state; state and thresholds are float32, as in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dynmoe.control import PIController
from megatron_dynmoe.control.calibrate import INTEGRAL_LOOP_GAIN, PROPORTIONAL_LOOP_GAIN

LIMIT = 2.0  # docs/controller.md: stable if and only if 2 kappa_p + kappa_i is below it
EXPERTS = [2, 8, 16, 64, 128, 512]
LANES = 32


@dataclass
class Plants:
    """Mean experts per token as a function of the threshold, measured with noise and late.

    Attributes:
        num_experts: the count saturates at 1 and at this.
        slope: experts per token per unit of threshold, for which the gains are made.
        target: the count at the threshold ``needed``.
        needed: where the target is met at step 0, [LANES].
        steeper: how much steeper a lane is than that, [LANES].
        drift: by how much ``needed`` moves in each step, [LANES].
        noise: standard deviation of the measurement, in experts, [LANES].
        stair: height of the stairs of the curve, in experts; 0 for a straight one.
        delay: steps by which a measurement is late.
    """

    num_experts: int
    slope: float
    target: float
    needed: Tensor
    steeper: Tensor = field(default_factory=lambda: torch.ones(LANES, dtype=torch.float64))
    drift: Tensor = field(default_factory=lambda: torch.zeros(LANES, dtype=torch.float64))
    noise: Tensor = field(default_factory=lambda: torch.zeros(LANES, dtype=torch.float64))
    stair: float = 0.0
    delay: int = 0

    def count(self, threshold: Tensor, step: int) -> Tensor:
        excess = self.slope * self.steeper * (threshold - self.needed - self.drift * step)
        if self.stair:
            excess = self.stair * (excess / self.stair).round()
        return (self.target + excess).clamp(1, self.num_experts)


def law_with(plants: Plants, kappa_p: float, kappa_i: float, start: float = 0.5) -> PIController:
    """A law with these loop gains on the plants."""
    unit = plants.num_experts / plants.slope
    return PIController(plants.num_experts, start, kappa_p * unit, kappa_i * unit)


def run(
    law: PIController, plants: Plants, threshold: Tensor, integral: Tensor, steps: int
) -> Tensor:
    """True counts [steps, LANES] float64, from a state on."""
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(steps, LANES, generator=generator, dtype=torch.float64) * plants.noise
    threshold, integral = threshold.float(), integral.float()
    counts: list[Tensor] = []
    for step in range(steps):
        counts.append(plants.count(threshold, step))
        measured = counts[max(step - plants.delay, 0)] + noise[step]
        threshold, integral = law.step(threshold, integral, measured, plants.target)
    assert threshold.dtype == integral.dtype == torch.float32
    return torch.stack(counts)


def uniform(seed: int, low: float, high: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(LANES, generator=generator, dtype=torch.float64)


@st.composite
def drawn_plants(draw: st.DrawFn) -> Plants:
    """Plants whose target is met well inside the bounds of the threshold.

    g = slope / N is that of routers, 0.2 to 3; with targets nearer to 1 or N an error could not be
    large enough to leave a saturated sum in the steps that are simulated.
    """
    num_experts = draw(st.sampled_from(EXPERTS))
    share = draw(st.floats(0.1, 0.9))
    return Plants(
        num_experts,
        slope=num_experts * draw(st.floats(0.2, 3)),
        target=1 + share * (num_experts - 1),
        needed=uniform(draw(seeds), 0.15, 0.85),
    )


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=12)
@given(
    plants=drawn_plants(),
    seed=seeds,
    delay=st.integers(0, 4),
    noise=st.floats(0, 0.02),
    stair=st.floats(0, 0.02),
)
def test_the_default_gains_hold_the_target_on_every_plant(
    plants: Plants, seed: int, delay: int, noise: float, stair: float
) -> None:
    """From any state, on plants steeper or flatter than computed, late, noisy and drifting."""
    law = law_with(plants, PROPORTIONAL_LOOP_GAIN, INTEGRAL_LOOP_GAIN)
    plants.steeper = uniform(seed, 0.4, 1.9)  # below 2.2, the margin with four steps of delay
    plants.drift = uniform(seed + 1, -2e-4, 2e-4)
    plants.noise = uniform(seed + 2, 0, noise * plants.target)
    plants.stair, plants.delay = stair * plants.target, delay
    low, high = law.integral_bounds
    start, sums = uniform(seed + 3, 0, 1), uniform(seed + 4, low, high)
    counts = run(law, plants, start, sums, steps=700)
    window = 300
    error = counts[-window:].mean(dim=0) - plants.target
    lag = plants.drift.abs() * plants.slope / INTEGRAL_LOOP_GAIN
    # Over a window the sum of the errors is what the integral gained, so noise hardly shows.
    allowed = 1.5 * lag + 0.01 * plants.target + 6 * plants.noise / math.sqrt(window)
    assert (error.abs() <= allowed).all(), error


@settings(max_examples=8)
@given(plants=drawn_plants(), kappa_p=st.floats(0, 0.9), share=st.floats(0.1, 0.9), seed=seeds)
def test_gains_inside_the_documented_region_converge(
    plants: Plants, kappa_p: float, share: float, seed: int
) -> None:
    """From anywhere within the bounds."""
    law = law_with(plants, kappa_p, share * (LIMIT - 2 * kappa_p))
    counts = run(law, plants, uniform(seed, 0, 1), torch.zeros(LANES), steps=1500)
    # Float32 resolves the threshold to 6e-8 and the sum to that share of its size.
    resolution = 1e-6 * plants.slope * (1 + law.integral_gain * max(law.integral_bounds))
    assert (counts[-20:] - plants.target).abs().max() < 1e-3 * plants.target + resolution


@settings(max_examples=8)
@given(plants=drawn_plants(), kappa_p=st.floats(0, 0.9), share=st.floats(1.1, 3))
def test_gains_outside_of_it_never_settle(plants: Plants, kappa_p: float, share: float) -> None:
    """From a deviation of a thousandth of the threshold; only the bounds end its growth."""
    plants.needed = torch.full((LANES,), 0.5, dtype=torch.float64)
    law = law_with(plants, kappa_p, share * (LIMIT - 2 * kappa_p))
    start = 0.5 + torch.linspace(5e-4, 1e-3, LANES, dtype=torch.float64)
    counts = run(law, plants, start, torch.zeros(LANES), steps=600)
    swings = (counts - plants.target).abs()
    assert (swings[-20:].amax(dim=0) > 1.5 * swings[0]).all()


@pytest.mark.parametrize(("delay", "margin"), [(0, 7.7), (1, 5.7), (4, 2.2)])
def test_the_documented_margins(delay: int, margin: float) -> None:
    plants = Plants(16, slope=6.0, target=4.0, needed=torch.full((LANES,), 0.5).double())
    plants.steeper = margin * torch.tensor([0.93, 1.07]).double().repeat(LANES // 2)
    plants.delay = delay
    law = law_with(plants, PROPORTIONAL_LOOP_GAIN, INTEGRAL_LOOP_GAIN)
    start = torch.full((LANES,), 0.5 + 1e-3)
    counts = run(law, plants, start, torch.zeros(LANES), steps=400) - plants.target
    stable, unstable = (counts[-20:].abs().amax(dim=0) / counts[0].abs())[:2]
    assert stable < 0.1 and unstable > 3


@settings(max_examples=8)
@given(num_experts=st.sampled_from(EXPERTS), integral_gain=st.floats(0.01, 5), seed=seeds)
def test_the_mean_error_is_what_the_sum_gained(
    num_experts: int, integral_gain: float, seed: int
) -> None:
    """Whatever is measured: while the sum is within its bounds the mean count over n steps is the
    target but for N (S_n - S_0) / n, which no plant can make grow. So the count cannot drift."""
    law = PIController(num_experts, 0.5, 0.1, integral_gain)
    target, steps = 1 + 0.3 * (num_experts - 1), 1000
    generator = torch.Generator().manual_seed(seed)
    largest = min(0.3, 0.1 * law.integral_bounds[1])
    errors = largest * torch.rand(steps, LANES, generator=generator, dtype=torch.float64)
    threshold, integral = torch.full((LANES,), 0.5), torch.zeros(LANES)
    measured = []
    for error in errors:  # an adversary that is biased until the sum comes near a bound
        bias = torch.where(integral < 0.5 * law.integral_bounds[1], 1, -1)
        measured.append(target - num_experts * bias * error)
        threshold, integral = law.step(threshold, integral, measured[-1], target)
    mean_error = target - torch.stack(measured).mean(dim=0)
    gained = num_experts * integral.double() / steps
    rounding = num_experts * 2**-24 * law.integral_bounds[1]
    assert (mean_error - gained).abs().max() <= rounding + 1e-12 * num_experts


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
def test_no_drift_in_100_000_steps_under_random_settings(seed: int) -> None:
    """64 plants at once, each with slope, noise and drift of its own, under gains of the seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float, lanes: int = 64) -> Tensor:
        return low + (high - low) * torch.rand(lanes, generator=generator, dtype=torch.float64)

    num_experts = EXPERTS[seed]
    target = draw(1 + 0.05 * (num_experts - 1), 0.95 * num_experts, 1).item()
    kappa_p, share = draw(0, 0.5, 1).item(), draw(0.05, 0.6, 1).item()
    steepest = num_experts * draw(0.5, 5, 1).item()
    plants = Plants(num_experts, steepest, target, needed=torch.full((64,), 0.5))
    law = law_with(plants, kappa_p, share * (LIMIT - 2 * kappa_p))
    slope = steepest * draw(0.2, 1)
    wander, period = draw(0, 0.2), draw(20, 200)
    noise = 0.01 * target * torch.randn(1000, 64, generator=generator, dtype=torch.float64)
    noise -= noise.mean(dim=0)
    noise[:, 0] = wander[0] = 0
    threshold, integral = torch.full((64,), 0.5), torch.zeros(64)
    block_means = []
    for block in range(100):
        total = torch.zeros(64, dtype=torch.float64)
        needed = 0.5 + wander * torch.sin(2 * math.pi * block / period)
        for step in range(1000):
            count = (target + slope * (threshold - needed)).clamp(1, num_experts)
            total += count
            threshold, integral = law.step(threshold, integral, count + noise[step], target)
        block_means.append(total / 1000)
    assert threshold.dtype == integral.dtype == torch.float32
    relative = torch.stack(block_means)[1:] / target - 1
    assert relative.abs().max() < 0.01
    assert relative[:, 0].abs().max() < 1e-5
    assert relative.mean(dim=0).abs().max() < 1e-3
