"""Prints tables of docs/controller.md and docs/rules.md: gains on simulated routers of any size.

    python benchmarks/controller_transfer.py

The plants are the real selection rules on simulated normal logits (DTop-p with DRN; expert
threshold and null experts, whose knob is a share) and, for ReLU, that of its test. The gains are
the default ones; nothing else is tuned. The script runs on a CPU in ten minutes; seeds are fixed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.controller_step_response import print_table, settled_from
from megatron_dynmoe.control import PIController, default_gains, initial_threshold, plant_slope
from megatron_dynmoe.control.pi import RELATIVE
from megatron_dynmoe.control.settle import settle, started_rule
from megatron_dynmoe.moe.rules.expert_threshold import START
from megatron_dynmoe.routing.crossings import crossings
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.rules import quantiles
from megatron_dynmoe.routing.rules.expert_threshold import select
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.command_line import CommandParser
from tests.control.test_training_plant import PLANTS, counts_over_target
from tests.control.test_training_plant import law as relu_law
from tests.control.test_training_plant import settled_from as relu_settled

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
# Of ReLU, whose count answers through training, late.
RELU_POINTS = ((64, 2), (64, 8), (512, 8), (512, 64), (512, 256))
RELU_DELAYS = (3.0, 10.0, 20.0)
# Of expert threshold's moving average.
DECAYS = (0.99, 0.999)
LAYERS, RISE_AT, RISE_STEPS = 4, 50, 1300


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
    print_table(
        "ReLU: steps to 10 % of half, and of nine of ten plants; widest deviation from step 600 on",
        ("experts, target", *(f"delay {delay:g}" for delay in RELU_DELAYS)),
        [relu_row(*point) for point in RELU_POINTS],
    )
    print_table(
        "Expert threshold, 16 experts: steps to 2 % after the target rises from 2 to 3",
        ("thresholds follow the share", *(f"decay {decay}" for decay in DECAYS)),
        [
            ("yes" if follows else "no", *(rise(decay, follows) for decay in DECAYS))
            for follows in (False, True)
        ],
    )
    print_table(
        "Expert threshold, target 2 of 16, logits that wander: mean and deviation of the counts",
        ("START", "steps 101 to 200", "201 to 400"),
        [wander_row(start) for start in (10.0, 100.0)],
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


def relu_row(num_experts: int, target: float) -> tuple[str, ...]:
    """How soon ReLU's count settles, for the test's plants with another delay."""
    cells = []
    for delay in RELU_DELAYS:
        plants = PLANTS[PLANTS[:, 1] == PLANTS[0, 1]].clone()
        plants[:, 1] = delay
        counts = counts_over_target(relu_law(RELATIVE), target, plants, num_experts)
        settled = relu_settled(counts)
        half, most = settled.median(), settled.quantile(0.9)
        cells.append(f"{half:.0f}, {most:.0f}; {counts[600:].std(dim=0).max():.1%}")
    return f"{num_experts}, {target:g}", *cells


def expert_thresholds(
    logits: Callable[[int], torch.Tensor],
    targets: list[float],
    *,
    decay: float,
    follows: bool = True,
    start: float = START,
) -> np.ndarray:
    """The counts of a loop of 16 experts, step by step.

    Args:
        logits: makes those of a step, [LAYERS, T, 16]. The layers share q.
        follows: whether the thresholds move at once as their quantiles do with the share; False:
            the moving average alone.
        start: how slowly the moving average becomes slow.
    """
    experts, given = 16, {"routing": "expert_threshold", "normalized": False}
    first = initial_threshold(experts, targets[0], **given)
    law = PIController(experts, first, *default_gains(experts, targets[0], **given))
    share, integral = torch.tensor([first]), torch.zeros(1)
    thresholds = torch.full((LAYERS, experts), NormalDist().inv_cdf(1 - first))
    counts = []
    for step, target in enumerate(targets):
        pairs = list(zip(logits(step), thresholds, strict=True))
        used = [float(select(batch_TE, one_E).sum() / len(batch_TE)) for batch_TE, one_E in pairs]
        counts.append(float(np.mean(used)))
        moved, integral = law.step(share, integral, torch.tensor([counts[-1]]), target)
        shares = (share, moved) if follows else (moved, moved)
        weight = max(1 - decay, start / (start + step))
        found = []
        for batch_TE, one_E in pairs:
            bins_EN = quantiles.count(batch_TE, one_E, None).view(experts, -1)
            found.append(quantiles.next_thresholds(one_E, bins_EN, *shares, weight))
        thresholds, share = torch.stack(found), moved
    return np.array(counts)


def rise(decay: float, follows: bool) -> int | str:
    """Steps to 2 % after a change of the target, long after the start."""
    generator = torch.Generator().manual_seed(5)

    def logits(_: int) -> torch.Tensor:
        return torch.randn(LAYERS, SHARE_TOKENS, 16, generator=generator)

    # The average is slow from the first step on, as if it had gone on for long.
    targets = [2.0] * RISE_AT + [3.0] * RISE_STEPS
    counts = expert_thresholds(logits, targets, decay=decay, follows=follows, start=0.01)
    return settled_from(list(counts[RISE_AT:] / 3 - 1))


def wander_row(start: float) -> tuple[str, ...]:
    """Counts if all logits wander together, by a tenth of their spread a step."""
    generator = torch.Generator().manual_seed(6)
    mean = torch.zeros(1)

    def logits(_: int) -> torch.Tensor:
        mean.add_(0.1 * torch.randn(1, generator=generator))
        return mean + torch.randn(LAYERS, 1024, 16, generator=generator)

    counts = expert_thresholds(logits, [2.0] * 400, decay=0.99, start=start)
    parts = (counts[100:200], counts[200:])
    return f"{start:g}", *(f"{part.mean():.2f}, {part.std():.2f}" for part in parts)


if __name__ == "__main__":
    main()
