"""Prints the table of docs/controller.md on gains that transfer: 8 to 512 experts, any target.

    python benchmarks/controller_transfer.py

The plant is the real selection rule on simulated normal logits with DRN. The default gains are
computed for each number of experts and target; nothing else is tuned. The script runs on a CPU in a
few minutes; seeds are fixed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.controller_step_response import print_table, settled_from
from megatron_dynmoe.control import PIController, default_gains, initial_threshold, plant_slope
from megatron_dynmoe.routing.crossings import crossings
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.settings.messages.command_line import CommandParser

# Targets from far below to far above the papers' eighth of the experts.
POINTS = ((8, 1.5), (8, 4), (16, 2), (64, 1.5), (64, 8), (64, 32), (128, 16), (256, 8), (512, 64))
LOGITS = 2**20
STEPS = 400
BATCHES = (2**11, 2**14, 2**22)


@dataclass(frozen=True)
class Plant:
    """The count as a function of the threshold, from a population of tokens.

    Attributes:
        crossings: the thresholds at which a token gains an expert, ascending.
        by_token_TK: the same for each token.
    """

    crossings: torch.Tensor
    by_token_TK: torch.Tensor

    @classmethod
    def of(cls, num_experts: int, theta: float) -> Plant:
        """Normal logits with DRN."""
        generator = torch.Generator().manual_seed(num_experts)
        shape = (LOGITS // num_experts, num_experts)
        logits_TE = torch.randn(shape, generator=generator, dtype=torch.float64)
        theta_1 = torch.tensor([theta], dtype=torch.float64)
        found_TK = crossings(normalize(logits_TE, theta_1).softmax(-1), None)
        return cls(found_TK.flatten().sort().values, found_TK)

    def count(self, threshold: torch.Tensor) -> float:
        """Mean experts per token."""
        passed = torch.searchsorted(self.crossings, threshold.double())
        return 1 + passed.item() / len(self.by_token_TK)

    def spread(self, threshold: torch.Tensor) -> float:
        """Standard deviation of the experts of a token."""
        return (self.by_token_TK <= threshold.double()).sum(dim=-1).double().std().item()


def main() -> None:
    CommandParser(description=__doc__).parse_args()
    rows = [row(num_experts, target) for num_experts, target in POINTS]
    batches = [f"rms at {tokens:,} tokens" for tokens in BATCHES]
    print_table(
        "Default gains: steps to 2 % after the target rises by a quarter, and noise at rest",
        ("experts, target", "slope", "theta 0.5", "theta 1", "theta 2", "theta 3", *batches),
        rows,
    )


def row(num_experts: int, target: float) -> tuple[str, ...]:
    """Settling at four sharpnesses of the router, and the noise of three sizes of batches."""
    plants = {theta: Plant.of(num_experts, theta) for theta in (0.5, 1.0, 2.0, 3.0)}
    settling = [f"{settling_steps(plant, num_experts, target)}" for plant in plants.values()]
    noise = [f"{rms(plants[1.0], num_experts, target, tokens):.2%}" for tokens in BATCHES]
    slope = plant_slope(num_experts, target)
    return f"{num_experts}, {target:g}", f"{slope:.3g}", *settling, *noise


def law_of(num_experts: int, target: float) -> PIController:
    """The law with its default gains."""
    first = initial_threshold(num_experts, target)
    return PIController(num_experts, first, *default_gains(num_experts, target))


def settling_steps(plant: Plant, num_experts: int, target: float) -> int | str:
    """How long the count takes after the target has risen by a quarter of what is above 1."""
    law = law_of(num_experts, target)
    before = target - 0.25 * (target - 1)
    threshold = torch.tensor([law.initial_threshold])
    integral = torch.zeros(1)
    deviations = []
    for step in range(2 * STEPS):
        aim = before if step < STEPS else target
        count = plant.count(threshold)
        if step >= STEPS:
            deviations.append((count - target) / target)
        threshold, integral = law.step(threshold, integral, torch.tensor([count]), aim)
    return settled_from(deviations)


def rms(plant: Plant, num_experts: int, target: float, tokens: int) -> float:
    """The count's deviation from the target at rest, relative to it, with tokens drawn anew."""
    law, generator = law_of(num_experts, target), np.random.default_rng(3)
    threshold, integral = torch.tensor([law.initial_threshold]), torch.zeros(1)
    noise = plant.spread(threshold) / tokens**0.5
    deviations = []
    for _ in range(STEPS):
        count = plant.count(threshold)
        deviations.append(count / target - 1)
        measured = torch.tensor([count + noise * generator.standard_normal()])
        threshold, integral = law.step(threshold, integral, measured, target)
    return float(np.sqrt(np.square(deviations[STEPS // 4 :]).mean()))


if __name__ == "__main__":
    main()
