"""The law of drawn targets against plants: any sequence of targets, drifting routers, noise."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dynmoe.control import MapController, PIController
from megatron_dynmoe.control.calibrate import INTEGRAL_LOOP_GAIN, PROPORTIONAL_LOOP_GAIN
from megatron_dynmoe.control.settle import settle
from megatron_dynmoe.routing.threshold_map import read
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.distribution import TargetDistribution, place_between
from tests.control.test_closed_loop import DriftingRouters

pytestmark = pytest.mark.slow  # all of them together

KNOTS = (1.0, 2.0, 4.0, 8.0)
RIGHT = (0.2, 0.3, 0.45, 0.7)  # the plant's thresholds at the knots


class LinearPlant:
    """A plant whose right map is linear between the knots and whose slope is ``slope``, in float64.

    The loop is then exactly the one whose stability docs/controller.md derives: gamma is 1.
    """

    def __init__(self, kappa_p: float, kappa_i: float, slope: float = 20.0) -> None:
        self.slope = slope
        unit = 1 / slope  # with one expert
        self.law = MapController(
            KNOTS,
            tuple(
                PIController(1, right, kappa_p * unit, kappa_i * unit, -50.0, 50.0)
                for right in RIGHT
            ),
        )
        self.ratio = kappa_i / kappa_p if kappa_p else 0.0
        self.unit = unit

    def measured(self, map_SK: Tensor, target: float) -> Tensor:
        place = place_between(KNOTS, target)
        right = read(torch.tensor([RIGHT], dtype=torch.float64), place)
        return target + self.slope * (read(map_SK.double(), place) - right)

    def energy(self, map_SK: Tensor, integrals_SK: Tensor) -> float:
        """V of docs/controller.md; equal slopes, so that its measure is the plain one."""
        settled = torch.tensor(RIGHT) + self.law.laws[0].integral_gain * integrals_SK
        distance, proportional = settled - torch.tensor(RIGHT), map_SK - settled
        return float(distance.square().sum() + self.ratio * proportional.square().sum())


targets_of_batches = st.lists(st.floats(1, 8), min_size=1, max_size=40)
errors_at_start = st.lists(st.floats(-0.02, 0.02), min_size=4, max_size=4)


@settings(deadline=None, max_examples=60)
@given(
    kappa_p=st.floats(0.01, 0.9),
    share=st.floats(0.02, 1),
    targets=targets_of_batches,
    start=errors_at_start,
)
def test_no_sequence_of_targets_adds_to_the_errors_of_a_map(
    kappa_p: float, share: float, targets: list[float], start: list[float]
) -> None:
    """Up to the documented limit, also with the order kept."""
    plant = LinearPlant(kappa_p, share * (2 - 2 * kappa_p))
    integrals = torch.tensor([start]) / plant.law.laws[0].integral_gain
    map_SK = torch.tensor([RIGHT]) + torch.tensor([start])
    before = plant.energy(map_SK, integrals)
    for target in targets:
        measured = plant.measured(map_SK, target)
        map_SK, integrals = plant.law.step(map_SK, integrals, measured, target)
        after = plant.energy(map_SK, integrals)
        assert after <= before * (1 + 1e-4) + 1e-9  # the state is float32
        before = after


def test_a_sequence_of_targets_diverges_past_the_limit() -> None:
    """The limit cannot be wider: a target that is always the same knot is one controller."""
    for kappa_p, kappa_i, grows in ((0.3, 1.3, False), (0.3, 1.5, True)):
        plant = LinearPlant(kappa_p, kappa_i)
        map_SK, integrals = torch.tensor([RIGHT]) + 1e-3, torch.zeros(1, 4)
        errors = []
        for _ in range(60):
            measured = plant.measured(map_SK, 4.0)
            errors.append(abs(measured.item() - 4.0))
            map_SK, integrals = plant.law.step(map_SK, integrals, measured, 4.0)
        assert (errors[-1] > errors[0]) == grows


def test_a_map_converges_at_the_documented_rate() -> None:
    """Equal errors at all targets go at 1.57 kappa_i / K a step at first."""
    drawn = TargetDistribution(1, 8, seed=5)
    plant = LinearPlant(PROPORTIONAL_LOOP_GAIN, INTEGRAL_LOOP_GAIN)
    # The first error is that of the threshold: 0.02 at all knots.
    integrals = torch.full((1, 4), 0.02) / plant.law.laws[0].integral_gain
    map_SK = torch.tensor([RIGHT]) + 0.02
    means = []
    for step in range(800):
        means.append((map_SK - torch.tensor(RIGHT)).abs().mean().item())
        target = drawn.at(step)
        measured = plant.measured(map_SK, target)
        map_SK, integrals = plant.law.step(map_SK, integrals, measured, target)
    expected = 0.02 * math.exp(-1.57 / 4 * INTEGRAL_LOOP_GAIN * 16)
    assert means[16] == pytest.approx(expected, rel=0.25)
    assert means[-1] < 1e-5


@pytest.mark.parametrize(("num_experts", "low", "high", "scope"), [(64, 2, 16, 1), (16, 1, 4, 2)])
def test_counts_follow_drawn_targets_on_drifting_noisy_routers(
    num_experts: int, low: float, high: float, scope: int
) -> None:
    """``scope``: the number of layers, each with its own map."""
    given_ = DynMoEConfig(routing="dtop_p", target_experts_per_token=f"uniform({low},{high})")
    sizes = SimpleNamespace(num_moe_experts=num_experts, hidden_size=64, init_method_std=0.02)
    resolved, law = settle(given_.resolve(num_experts), sizes)
    drawn, plant = resolved.drawn_target, DriftingRouters(num_experts, scope)
    assert isinstance(law, MapController) and drawn is not None
    map_SK = torch.tensor([law.initial_map] * scope)
    integrals = torch.zeros_like(map_SK)
    relative = []
    for step in range(300):
        target = drawn.at(step)
        counts = plant.count(read(map_SK, drawn.place(target)), step)
        relative.append((counts / target - 1).tolist())
        map_SK, integrals = law.step(map_SK, integrals, counts, target)
        assert (map_SK.diff(dim=-1) >= 0).all()
    errors = torch.tensor(relative)[150:]
    assert errors.mean(dim=0).abs().max() < 0.01
    assert errors.square().mean(dim=0).sqrt().max() < 0.03
