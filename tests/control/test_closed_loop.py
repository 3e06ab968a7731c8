"""The law against a plant: simulated routers that drift and are measured with noise, and linear
plants where the theory of docs/controller.md is exact."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dynmoe.control import (
    PIController,
    default_gains,
    initial_threshold,
    mean_experts_per_token,
)
from megatron_dynmoe.control.calibrate import INTEGRAL_LOOP_GAIN, PROPORTIONAL_LOOP_GAIN
from megatron_dynmoe.routing.select import select

pytestmark = pytest.mark.slow  # all of them together

GRANULARITIES = [(16, 2), (64, 8), (128, 16)]
SEED = 7
STEPS = 600


class DriftingRouters:
    """Layers whose logits sharpen and grow heavier tails as if they learned, fresh tokens a batch.

    Counts come from the real selection rule on 2^16 logits a layer: the noise is that of a small
    batch. Over ``STEPS`` batches theta grows from 0.9 to 1.01, the cubic term that makes the tails
    from 0 to 0.015. Layers differ in sharpness and in how popular each expert is.
    """

    def __init__(self, num_experts: int, num_layers: int) -> None:
        self.generator = torch.Generator().manual_seed(SEED)
        self.shape = (2**16 // num_experts, num_experts)
        self.sharpness = torch.linspace(0.8, 1.25, num_layers) if num_layers > 1 else torch.ones(1)
        self.popularity = 0.3 * torch.randn(num_layers, num_experts, generator=self.generator)

    def count(self, threshold: Tensor, step: int) -> Tensor:
        return torch.stack(
            [
                mean_experts_per_token(self._probs(layer, step), threshold[layer])
                for layer in range(len(self.sharpness))
            ]
        )

    def rows(self, threshold: Tensor, step: int) -> Tensor:
        """Tokens of each expert in the first layer, [E]."""
        return select(self._probs(0, step), threshold[0]).sum(dim=0)

    def _probs(self, layer: int, step: int) -> Tensor:
        progress = step / STEPS
        theta = 0.9 + 0.11 * progress
        normal = torch.randn(self.shape, generator=self.generator)
        bent = normal * (1 + 0.015 * progress * normal.square())
        logits = theta * self.sharpness[layer] * (bent + self.popularity[layer])
        return logits.softmax(-1)


def default_law(num_experts: int, target: float) -> PIController:
    threshold = initial_threshold(num_experts, target)
    return PIController(num_experts, threshold, *default_gains(num_experts, target))


def close_loop(
    law: PIController,
    plant: DriftingRouters,
    target: float,
    threshold: Tensor,
    integral: Tensor,
    steps: int,
) -> Tensor:
    """Counts relative to the target, [steps, S]."""
    counts = []
    for step in range(steps):
        counts.append(plant.count(threshold, step))
        threshold, integral = law.step(threshold, integral, counts[-1], target)
    return torch.stack(counts) / target


def assert_holds(relative_counts: Tensor) -> None:
    """From step 200 on within 1 % in every window of 20 steps, and no oscillation that grows."""
    settled = relative_counts[200:]
    window_means = settled.unfold(0, 20, 1).mean(-1)
    assert (window_means - 1).abs().max() < 0.01
    early, late = settled.diff(dim=0).chunk(2)
    assert (late.std(0) < 1.5 * early.std(0)).all()


@pytest.mark.parametrize(("num_experts", "target"), GRANULARITIES)
def test_holds_the_target_on_drifting_noisy_routers(num_experts: int, target: int) -> None:
    law = default_law(num_experts, target)
    plant = DriftingRouters(num_experts, num_layers=1)
    start = torch.tensor([law.initial_threshold])
    assert_holds(close_loop(law, plant, target, start, torch.zeros(1), STEPS))


@pytest.mark.parametrize(("num_experts", "target"), GRANULARITIES)
@pytest.mark.parametrize("bound", [0, 1])
def test_recovers_from_saturation(num_experts: int, target: int, bound: int) -> None:
    """The sum is saturated as well: the end of a long time in which no threshold was enough."""
    law = default_law(num_experts, target)
    plant = DriftingRouters(num_experts, num_layers=1)
    start = torch.tensor([(law.min_threshold, law.max_threshold)[bound]])
    integral = torch.tensor([law.integral_bounds[bound]])
    counts = close_loop(law, plant, target, start, integral, steps=260)
    assert (counts[0] - 1).abs() > 0.4
    assert (counts[80:].unfold(0, 20, 1).mean(-1) - 1).abs().max() < 0.03
    assert_holds(counts)


def test_holds_the_target_in_every_layer() -> None:
    num_experts, target, num_layers = 64, 8, 3
    law = default_law(num_experts, target)
    plant = DriftingRouters(num_experts, num_layers)
    start = torch.full((num_layers,), law.initial_threshold)
    counts = close_loop(law, plant, target, start, torch.zeros(num_layers), 400)
    assert_holds(counts)


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_holds_the_busiest_rank_with_the_same_gains(num_ranks: int) -> None:
    """Experts of different popularity: what is held is the mean times busiest over mean rank."""
    num_experts, target = 64, 8
    law, plant = default_law(num_experts, target), DriftingRouters(num_experts, num_layers=1)
    threshold, integral = torch.tensor([law.initial_threshold]), torch.zeros(1)
    held, means = [], []
    for step in range(400):
        rows_R = plant.rows(threshold, step).view(num_ranks, -1).sum(dim=1)
        busiest = rows_R.max() * num_ranks / plant.shape[0]
        held.append(busiest.reshape(1))
        means.append(rows_R.sum().item() / plant.shape[0])
        threshold, integral = law.step(threshold, integral, held[-1], target)
    assert_holds(torch.stack(held) / target)
    assert sum(means[200:]) / 200 < 0.97 * target  # the ranks are not equally busy


@pytest.mark.parametrize("steps", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_count_does_not_drift(steps: int) -> None:
    """32 linear plants, drifting and noisy but the first, which must stay put to the last bit.

    The state is float32 throughout; a sum that lost small errors would let the count wander.
    """
    num_experts, target, lanes = 64, 8.0, 32
    law = default_law(num_experts, target)
    slope = 30.77 * torch.linspace(0.5, 4.0, lanes)
    # How far the threshold that is needed moves, at the same pace in a shorter run.
    wander = torch.linspace(0, 0.2, lanes) * steps / 100_000
    generator = torch.Generator().manual_seed(SEED)
    noise = 0.05 * torch.randn(1000, lanes, generator=generator)
    noise -= noise.mean(0)  # it repeats, so that a mean would be an offset of the count
    noise[:, 0] = 0
    threshold, integral = torch.full((lanes,), law.initial_threshold), torch.zeros(lanes)
    block_means = []
    for block in range(steps // 1000):
        total = torch.zeros(lanes)
        turn = 2 * math.pi * block * 1000 / steps
        needed = law.initial_threshold + 0.01 + wander * math.sin(turn)
        for step in range(1000):
            count = target + slope * (threshold - needed)
            total += count
            threshold, integral = law.step(threshold, integral, count + noise[step], target)
        block_means.append(total / 1000)
    relative = torch.stack(block_means)[1:] / target - 1
    assert relative.abs().max() < 2e-3
    assert relative[:, 0].abs().max() < 1e-5
    assert relative.mean(0).abs().max() < 2e-4


def linear_deviation(kappa_p: float, kappa_i: float, steps: int) -> float:
    """Largest of the last 10 deviations relative to the first, on a linear plant in float64."""
    law = PIController(1, 0.5, kappa_p, kappa_i)
    start = 1e-6
    threshold, integral = torch.tensor([0.5 + start]).double(), torch.zeros(1).double()
    last: list[float] = []
    for _ in range(steps):
        deviation = threshold - 0.5
        last = [*last[-9:], abs(deviation.item()) / start]
        threshold, integral = law.step(threshold, integral, deviation, 0.0)
    return max(last)


# The linear plant has slope 1 and one expert: g = 1, and gains are loop gains.
proportional_loop_gains = st.floats(0, 0.9)


@settings(deadline=None, max_examples=20)
@given(kappa_p=proportional_loop_gains, share=st.floats(0.1, 0.9))
def test_linear_loop_converges_inside_the_documented_region(kappa_p: float, share: float) -> None:
    assert linear_deviation(kappa_p, share * (2 - 2 * kappa_p), steps=400) < 0.2


@settings(deadline=None, max_examples=20)
@given(kappa_p=proportional_loop_gains, share=st.floats(1.05, 3))
def test_linear_loop_diverges_outside(kappa_p: float, share: float) -> None:
    assert linear_deviation(kappa_p, share * (2 - 2 * kappa_p), steps=400) > 1.5


def test_default_loop_settles_as_documented() -> None:
    deviations = [linear_deviation(PROPORTIONAL_LOOP_GAIN, INTEGRAL_LOOP_GAIN, n) for n in (18, 36)]
    assert deviations[0] > 0.02 > deviations[1]
