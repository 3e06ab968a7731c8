"""Prints the tables of docs/controller.md on gains that transfer: 8 to 512 experts, any target.

    python benchmarks/controller_transfer.py

The plant is the real selection rule on simulated normal logits, for DTop-p with DRN. The default
gains are computed for each number of experts and target; nothing else is tuned. The script runs on
a CPU in a few minutes; seeds are fixed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.controller_step_response import print_table, settled_from
from megatron_dynmoe.control import PIController, default_gains, initial_threshold, plant_slope
from megatron_dynmoe.control.settle import settle, started_rule
from megatron_dynmoe.routing.crossings import crossings
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.command_line import CommandParser

# Targets from far below to far above the papers' eighth of the experts.
POINTS = (
    *((8, 1.5), (8, 2), (8, 4), (16, 2), (64, 1.5), (64, 8), (64, 16), (64, 32), (128, 16)),
    *((256, 8), (512, 64), (512, 128), (512, 256)),
)
LOGITS = 2**20
STEPS = 400
BATCHES = (2**11, 2**14, 2**22)
# Of the rules whose knob is a share of tokens, which are simulated token by token.
SHARE_RULES = ("expert_threshold", "null_experts")
SHARE_POINTS = ((8, 1.5), (16, 2), (64, 8), (64, 32), (512, 64))
SHARE_TOKENS, SHARE_STEPS = 2**13, 60


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
        (
            *("experts, target", "slope", "kappa_i", "slope at theta 3"),
            *("theta 0.5", "theta 1", "theta 2", "theta 3", *batches),
        ),
        rows,
    )
    print_table(
        f"Rules with a share as knob, batches of {SHARE_TOKENS:,} tokens",
        (
            *("rule", "experts, target", "slope", "slope / N"),
            *("steps to 2 %", "rms afterwards", "rms of a batch with fixed thresholds"),
        ),
        [share_row(rule, *point) for rule in SHARE_RULES for point in SHARE_POINTS],
    )


def row(num_experts: int, target: float) -> tuple[str, ...]:
    """Settling at four sharpnesses of the router, and the noise of three sizes of batches."""
    plants = {theta: Plant.of(num_experts, theta) for theta in (0.5, 1.0, 2.0, 3.0)}
    settling = [f"{settling_steps(plant, num_experts, target)}" for plant in plants.values()]
    noise = [f"{rms(plants[1.0], num_experts, target, tokens):.2%}" for tokens in BATCHES]
    slope = plant_slope(num_experts, target)
    loop_gain = law_of(num_experts, target).integral_gain * slope / num_experts
    steepness = plant_slope(num_experts, target, theta=3.0) / slope
    about = f"{num_experts}, {target:g}", f"{slope:.3g}", f"{loop_gain:.3f}", f"{steepness:.2g}x"
    return *about, *settling, *noise


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


def share_row(routing: str, num_experts: int, target: float) -> tuple[str, ...]:
    """The same for a rule whose knob is a share: slope, settling and noise of the whole loop."""
    given = DynMoEConfig(routing=routing, target_experts_per_token=target)
    model = SimpleNamespace(num_moe_experts=num_experts, hidden_size=2500, init_method_std=0.02)
    settled, law = settle(given.resolve(num_experts), model)
    assert isinstance(law, PIController)
    rule = started_rule(settled, law, model)
    state = {name: torch.tensor(values) for name, values in rule.first_state.items()}
    integral, generator = torch.zeros(1), torch.Generator().manual_seed(num_experts)

    def routed(state: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor | None]:
        shape = (SHARE_TOKENS, num_experts + rule.extra_logits)
        logits_TE = torch.randn(shape, generator=generator)
        batch = {"theta": None, "num_sequences": 1, "valid_T": None, "training": True}
        result = rule.route(logits_TE, state, group=None, **batch)
        return float(result.experts_T.double().mean()), result.sums_W

    def after(state: dict[str, torch.Tensor], sums_W: torch.Tensor, share: torch.Tensor) -> dict:
        rows = {name: values.unsqueeze(0) for name, values in state.items()}
        moved = rule.next_state(rows, sums_W.unsqueeze(0), share.unsqueeze(0))
        return {**state, "share": share, **{name: new.squeeze(0) for name, new in moved.items()}}

    deviations = []
    for step in range(3 * SHARE_STEPS):
        aim = target - 0.25 * (target - 1) if step < SHARE_STEPS else target
        count, sums_W = routed(state)
        deviations.append((count - target) / target)
        share, integral = law.step(state["share"], integral, torch.tensor([count]), aim)
        state = after(state, sums_W, share)
    loop = np.array(deviations[SHARE_STEPS:])
    means = np.convolve(loop, np.full(5, 0.2), "valid")  # a single batch is off by chance
    fixed = [routed(state)[0] / target for _ in range(20)]
    sums_W = routed(state)[1]
    up, down = (after(state, sums_W, state["share"] * way) for way in (1.1, 0.9))
    counts = [np.mean([routed(moved)[0] for _ in range(10)]) for moved in (up, down)]
    slope = (counts[0] - counts[1]) / (0.2 * float(state["share"]))
    return (
        *(routing, f"{num_experts}, {target:g}", f"{slope:.4g}", f"{slope / num_experts:.2f}"),
        *(f"{settled_from(list(means))}", f"{np.sqrt((loop[60:] ** 2).mean()):.2%}"),
        f"{np.std(fixed):.2%}",
    )


if __name__ == "__main__":
    main()
