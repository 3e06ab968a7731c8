"""The law on log lambda against a count that answers through training, as ReLU routing's does.

The plant: the task opens gates with a force s a step and the L1 loss closes them with
``s lambda / lambda*``, bounded as Adam bounds a step; the optimizer's momentum delays both, and the
count relaxes towards the target's neighborhood by itself a little or not at all.
"""

import itertools
import math

import pytest
import torch

from megatron_dynmoe.control.pi import RELATIVE, SIGN, PIController
from megatron_dynmoe.settings.routings import ROUTINGS

E, STEPS = 64, 1500


def law(errors: str) -> PIController:
    kind = ROUTINGS["relu"]
    given = dict(kind.defaults) | (kind.law_defaults["sign"] if errors == SIGN else {})
    names = ("initial_threshold", "proportional_gain", "integral_gain")
    bounds = given["min_threshold"], given["max_threshold"]
    return PIController(E, *(given[name] for name in names), *bounds, errors)


def counts_over_target(
    controller: PIController, target: float, plants: torch.Tensor
) -> torch.Tensor:
    """[STEPS, number of plants]; a plant is a row of s, delay, relaxation and log10 of lambda*."""
    force, delay, relaxation, balanced = plants.T
    generator = torch.Generator().manual_seed(3)
    knob = torch.full_like(force, controller.initial_threshold)
    integral, speed = torch.zeros_like(force), torch.zeros_like(force)
    excess = torch.full_like(force, math.log(E / 2 / target))  # half of the gates are open
    counts = []
    for _ in range(STEPS):
        counts.append(excess.exp())
        noise = 1 + 0.08 * torch.randn(force.shape, generator=generator)
        measured = target * excess.exp() * noise
        speed += (force * (1 - (10 ** (knob - balanced)).clamp(max=8)) - speed) / delay
        excess = (excess + speed - relaxation * excess).clamp(max=math.log(E / target))
        knob, integral = controller.step(knob, integral, -measured, -target)
    return torch.stack(counts)


PLANTS = torch.tensor(
    [*itertools.product((0.01, 0.02, 0.05), (3.0, 10.0), (0.04, 0.1, 0.2), (-4.0, -3.0, -2.0))]
)


@pytest.mark.parametrize("target", [2.0, 8.0])
def test_the_default_gains_settle_every_plant_near_its_target(target):
    counts = counts_over_target(law(RELATIVE), target, PLANTS)
    late = counts[600:]
    assert (late.mean(dim=0) - 1).abs().max() < 0.06
    assert late.std(dim=0).max() < 0.1
    smooth = counts.unfold(0, 20, 1).mean(dim=-1)
    away = ((smooth - 1).abs() > 0.1).cumsum(dim=0).argmax(dim=0) + 20  # the last such step
    assert away.float().median() < 250


def test_the_papers_law_swings_wider_than_pi():
    """Both move lambda equally fast far off the target; near it, the sign does not slow down."""
    paper, default = (
        counts_over_target(law(errors), 2.0, PLANTS)[600:].std(dim=0) for errors in (SIGN, RELATIVE)
    )
    assert paper.median() > 2 * default.median()
    assert (paper > default).all()
