"""The default gains on routers of any size, target and sharpness.

docs/controller.md states how long the count takes to settle, and how much noise is left.

A plant here is the selection rule itself on normal logits, normalized to a standard deviation theta
that the gains do not know.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_dynmoe.control import PIController, default_gains, initial_threshold

SETTLES_WITHIN = 40  # steps to 2 %, at targets from 2 to a quarter of the experts
SETTLES_AT_HALF = 200  # and up to half of them
REST = 800


class Router:
    """The experts of a population of tokens, which does not change."""

    def __init__(self, num_experts: int, theta: float, seed: int, logits: int = 2**17) -> None:
        generator = np.random.default_rng(seed)
        logits_TE = generator.standard_normal((logits // num_experts, num_experts))
        logits_TE -= logits_TE.mean(axis=1, keepdims=True)
        exponentials = np.exp(theta * logits_TE / logits_TE.std(axis=1, keepdims=True))
        probs = -np.sort(-exponentials / exponentials.sum(axis=1, keepdims=True), axis=1)
        self.sums_TE = probs.cumsum(axis=1)[:, :-1]
        self.sums = np.sort(self.sums_TE, axis=None)

    def count(self, threshold: torch.Tensor) -> float:
        """A token goes on to its next expert while the sum does not exceed the threshold."""
        passed = np.searchsorted(self.sums, float(threshold), side="right")
        return 1 + float(passed) / len(self.sums_TE)

    def spread(self, threshold: float) -> float:
        return float((self.sums_TE <= threshold).sum(axis=1).std())

    def threshold(self, target: float) -> float:
        return float(self.sums[round((target - 1) * len(self.sums_TE))])


def run(
    router: Router, law: PIController, targets: list[float], noise: float = 0.0, seed: int = 0
) -> np.ndarray:
    """The counts of a loop that begins at rest; the noise is that of a batch, in experts."""
    generator = np.random.default_rng(seed)
    start = router.threshold(targets[0])
    threshold = torch.tensor([start])
    integral = (threshold - law.initial_threshold) / law.integral_gain
    counts = []
    for target in targets:
        counts.append(router.count(threshold))
        measured = torch.tensor([counts[-1] + noise * generator.standard_normal()])
        threshold, integral = law.step(threshold, integral, measured, target)
    return np.array(counts)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[int, float, float, int]:
    """Experts, target, theta, seed."""
    num_experts = draw(st.sampled_from([8, 16, 32, 64, 128, 256, 512]))
    share = draw(st.floats(1 / 32, 1 / 2))
    target = round(max(2.0, share * num_experts), 2)
    return num_experts, target, draw(st.floats(0.5, 3)), draw(st.integers(0, 2**16))


@settings(max_examples=16)
@given(router=drawn())
@example(router=(64, 32.0, 3.0, 0))  # 25 times as steep as the router of the gains
@example(router=(512, 256.0, 0.5, 0))  # the slowest
def test_the_count_settles_in_the_stated_time(router: tuple[int, float, float, int]) -> None:
    """After the target has risen by a quarter of what is above 1."""
    num_experts, target, theta, seed = router
    law = PIController(
        num_experts, initial_threshold(num_experts, target), *default_gains(num_experts, target)
    )
    before = target - 0.25 * (target - 1)
    counts = run(Router(num_experts, theta, seed), law, [before] + 400 * [target])
    within = SETTLES_WITHIN if target <= num_experts / 4 else SETTLES_AT_HALF
    # Of few tokens, the next count may be more than 2 % away.
    assert abs(counts[within:] / target - 1).max() < 0.02 + 2 * num_experts / 2**17


def settling(router: Router, num_experts: int, target: float) -> int:
    """Steps to 2 % after the same rise."""
    law = PIController(
        num_experts, initial_threshold(num_experts, target), *default_gains(num_experts, target)
    )
    counts = run(router, law, [target - 0.25 * (target - 1)] + 800 * [target])
    return int(np.flatnonzero(abs(counts / target - 1) >= 0.02)[-1]) + 1


def test_a_target_near_1_of_512_experts_settles_in_the_stated_time() -> None:
    """A sharper router hardly answers there."""
    flat, sharp, sharper = (
        settling(Router(512, theta, seed=0, logits=2**20), 512, 1.2) for theta in (1, 2, 3)
    )
    assert flat < 10 < sharp < sharper <= 70


def test_three_quarters_of_64_experts_settle_in_the_stated_time() -> None:
    """A flatter router is slower, because the gains are made for a margin at theta 3."""
    steps = [settling(Router(64, theta, seed=0), 64, 48.0) for theta in (0.5, 1.0, 2.0, 3.0)]
    assert steps == sorted(steps, reverse=True)
    assert 6 <= steps[-1] < 10 and steps[0] == pytest.approx(670, abs=15)


@settings(max_examples=8)
@given(router=drawn(), tokens=st.sampled_from([2**10, 2**14, 2**22]))
def test_the_loop_does_not_swell_the_noise_of_a_batch(
    router: tuple[int, float, float, int], tokens: int
) -> None:
    """Whatever its size: at rest the count varies no more than a batch's mean does by chance."""
    num_experts, target, theta, seed = router
    law = PIController(
        num_experts, initial_threshold(num_experts, target), *default_gains(num_experts, target)
    )
    plant = Router(num_experts, theta, seed)
    noise = plant.spread(plant.threshold(target)) / tokens**0.5
    counts = run(plant, law, REST * [target], noise, seed)
    resolution = num_experts / 2**17 + 1e-6 * target
    assert counts[REST // 4 :].std() < 1.3 * noise + 4 * resolution
    assert abs(counts[REST // 4 :].mean() - target) < 0.2 * noise + 4 * resolution
