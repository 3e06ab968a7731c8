"""Prints the tables of docs/controller.md for targets that are drawn anew for each batch.

    python benchmarks/drawn_target.py

The plant is the real selection rule on simulated normal logits with DRN, whose sharpness theta
stands for what the router has learned. The script runs on a CPU in under a minute; seeds are fixed.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.controller_step_response import print_table
from megatron_dynmoe.control import MapController, PIController
from megatron_dynmoe.control.settle import settle
from megatron_dynmoe.routing.crossings import crossings
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.threshold_map import read
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.distribution import TargetDistribution
from megatron_dynmoe.settings.messages.command_line import CommandParser

TOKENS = 8192
RANGES = ((16, 1.0, 4.0), (64, 2.0, 16.0), (128, 4.0, 32.0))
STEPS = 600


def main() -> None:
    CommandParser(description=__doc__).parse_args()
    print_knots()
    print_rates()
    print_responses()


def print_knots() -> None:
    """How far the counts of the best map are from their targets, for each number of knots."""
    rows = []
    for experts, low, high in RANGES:
        for theta in (0.5, 1.0, 2.0, 3.0):
            cells = []
            for num_knots in (3, 4, 5, 6, 8):
                relative = best_map(experts, low, high, theta, num_knots)
                cells.append(f"{np.sqrt((relative**2).mean()):.1%} ({np.abs(relative).max():.1%})")
            rows.append((f"{experts}, {low:g} to {high:g}", f"{theta:g}", *cells))
    columns = ("experts, targets", "theta", *(f"{knots} knots" for knots in (3, 4, 5, 6, 8)))
    print_table("Error of the best map: root mean square (largest)", columns, rows)


def best_map(experts: int, low: float, high: float, theta: float, num_knots: int) -> np.ndarray:
    """Relative errors of the counts over the range, with the map that the law would settle at."""
    targets = np.linspace(low, high, 400)
    with mock.patch.object(TargetDistribution, "NUM_KNOTS", num_knots):
        drawn = TargetDistribution(low, high)
        weights = np.array([weights_of(drawn, target) for target in targets])
        knots = drawn.knots
    points = points_of(experts, theta)
    thresholds = np.array([threshold_of(points, knot) for knot in knots])
    slopes = np.array(
        [(count_at(points, one + 0.01) - count_at(points, one - 0.01)) / 0.02 for one in thresholds]
    )
    share = weights / (weights**2).sum(1, keepdims=True) / np.maximum(slopes, 1)
    for _ in range(300):
        counts = np.array([count_at(points, one) for one in weights @ thresholds])
        thresholds = thresholds + 0.5 * num_knots * (share * (targets - counts)[:, None]).mean(0)
    return np.array([count_at(points, one) for one in weights @ thresholds]) / targets - 1


def print_rates() -> None:
    """Eigenvalues of the mean update, relative to kappa_i: the rates of the modes of a map."""
    rows = []
    for low, high in ((1.0, 4.0), (2.0, 16.0)):
        for name, norm in (("as shares (the law)", True), ("as weights", False)):
            drawn = TargetDistribution(low, high)
            mean = np.zeros((len(drawn.knots),) * 2)
            for target in np.linspace(low, high, 4000):
                weights = weights_of(drawn, target)
                size = (weights**2).sum() if norm else 1.0
                mean += np.outer(weights, weights) / size / 4000
            values = np.linalg.eigvalsh(mean)
            together = mean.sum() / len(mean)
            shown = [f"{rate:.3f}" for rate in (*values, together)]
            rows.append((f"{low:g} to {high:g}", name, *shown))
    columns = ("targets", "error divided", *(f"mode {k}" for k in range(1, 6)), "all alike")
    print_table("Rates of a map's modes, over kappa_i", columns, rows)


def print_responses() -> None:
    """What the map does when the router becomes sharper, at once or slowly, beside one target."""
    rows = []
    schedules: dict[str, Callable[[int], float]] = {
        "jump of theta from 1 to 1.5": lambda step: 1.0 if step < 100 else 1.5,
        "theta from 1 to 1.5 in 300 steps": lambda step: (
            1 + 0.5 * min(max(step - 100, 0), 300) / 300
        ),
    }
    for experts, low, high in RANGES:
        for name, theta_at in schedules.items():
            for target in ("drawn", str((low + high) / 2)):
                drawn = f"uniform({low:g},{high:g})" if target == "drawn" else target
                relative = np.array(list(respond(experts, drawn, theta_at)))
                windows = [relative[100 + a : 100 + b] for a, b in ((0, 25), (25, 50), (50, 100))]
                windows += [relative[200:400], relative[500:]]
                errors = [f"{np.sqrt((part**2).mean()):.2%}" for part in windows]
                rows.append((f"{experts}, {low:g} to {high:g}", name, target, *errors))
    columns = ("experts, targets", "router", "target", "steps 0 to 25", "25 to 50", "50 to 100")
    columns += ("100 to 300", "400 to 500")
    print_table("Relative error of the count, root mean square", columns, rows)


def respond(experts: int, target: str, theta_at: Callable[[int], float]) -> Iterator[float]:
    """The law itself on the selection rule: relative errors of the counts, step by step."""
    given = DynMoEConfig(routing="dtop_p", target_experts_per_token=target)
    sizes = SimpleNamespace(num_moe_experts=experts, hidden_size=64, init_method_std=0.02)
    settings, law = settle(given.resolve(experts), sizes)
    targets = settings.control.target
    if isinstance(law, PIController):
        law = MapController((targets.at(0),), (law,))
    assert law is not None
    state = torch.tensor([law.initial_map]), torch.zeros(1, len(law.knots))
    for step in range(STEPS):
        wanted = targets.at(step)
        place = targets.place(wanted) if isinstance(targets, TargetDistribution) else (0, 0.0)
        theta = round(theta_at(step) / 0.025) * 0.025
        count = count_at(points_of(experts, theta), read(state[0], place).item())
        yield count / wanted - 1
        state = law.step(*state, torch.tensor([count]), wanted)


def weights_of(drawn: TargetDistribution, target: float) -> np.ndarray:
    knot, way = drawn.place(target)
    weights = np.zeros(len(drawn.knots))
    weights[knot] = 1 - way
    if way:
        weights[knot + 1] = way
    return weights


@lru_cache
def points_of(experts: int, theta: float) -> np.ndarray:
    """The thresholds at which tokens gain an expert, in order."""
    logits = torch.from_numpy(np.random.RandomState(3).standard_normal((TOKENS, experts)))
    return np.sort(crossings(normalize(logits, theta).softmax(-1), None).flatten().numpy())


def count_at(points: np.ndarray, threshold: float) -> float:
    return 1 + float(np.searchsorted(points, threshold, side="right")) / TOKENS


def threshold_of(points: np.ndarray, target: float) -> float:
    return float(points[min(math.ceil((target - 1) * TOKENS), len(points) - 1)])


if __name__ == "__main__":
    main()
