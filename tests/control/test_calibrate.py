"""Thresholds, slopes and gains computed before training."""

import math
import random
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dynmoe.control import (
    default_gains,
    gain_margin,
    initial_threshold,
    mean_experts_per_token,
    plant_slope,
    threshold_for_target,
)
from megatron_dynmoe.control.calibrate import INTEGRAL_LOOP_GAIN, PROPORTIONAL_LOOP_GAIN


def count_by_hand(probs: list[float], threshold: float, max_experts: int | None) -> int:
    """Algorithm 1 for one token: add the most probable expert until the sum exceeds."""
    total, count = 0.0, 0
    for prob in sorted(probs, reverse=True):
        total, count = total + prob, count + 1
        if total > threshold or count == max_experts:
            break
    return count


def random_probs(num_tokens: int, num_experts: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64).softmax(
        -1
    )


@pytest.mark.slow
@settings(deadline=None)
@given(
    num_experts=st.integers(1, 9),
    threshold=st.floats(0, 0.999),
    max_experts=st.none() | st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_mean_agrees_with_the_algorithm(
    num_experts: int, threshold: float, max_experts: int | None, seed: int
) -> None:
    probs_TE = random_probs(20, num_experts, seed)
    by_hand = [count_by_hand(row, threshold, max_experts) for row in probs_TE.tolist()]
    mean = mean_experts_per_token(probs_TE, threshold, max_experts)
    assert mean.item() == pytest.approx(sum(by_hand) / 20)


def test_mean_exactly_on_a_cumulative_sum_takes_one_more() -> None:
    probs_TE = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    on_sums = [mean_experts_per_token(probs_TE, p).item() for p in (0, 0.5, 0.75, 0.875, 1)]
    assert on_sums == [1, 2, 3, 4, 4]
    assert mean_experts_per_token(probs_TE, torch.tensor([0.75]), max_experts=2).item() == 2


def test_threshold_of_one_selects_all_whatever_the_rounding() -> None:
    probs_TE = torch.tensor([[0.6, 0.4 + 1e-6, 1e-30, 0.0]])  # the sum passes 1 early
    assert mean_experts_per_token(probs_TE, 1.0).item() == 4


@pytest.mark.parametrize("max_experts", [None, 6])
@pytest.mark.parametrize("target", [1, 1.01, 2, 3.37, 5.99, 6])
def test_threshold_gives_its_target(target: float, max_experts: int | None) -> None:
    probs_TE = random_probs(500, 12, seed=3)
    threshold = threshold_for_target(probs_TE, target, max_experts)
    mean = mean_experts_per_token(probs_TE, threshold, max_experts)
    assert mean.item() == pytest.approx(target, abs=0.5 / 500 + 1e-6)


def test_threshold_at_the_ends() -> None:
    probs_TE = random_probs(50, 8, seed=4)
    assert threshold_for_target(probs_TE, 1) == 0.0
    assert threshold_for_target(probs_TE, 8) == 1.0
    assert threshold_for_target(probs_TE, 3, max_experts=3) == 1.0


def test_threshold_on_equal_probabilities_is_the_jump() -> None:
    """The mean is 1 below 1/4 and 2 from there on: 1.5 does not exist."""
    probs_TE = torch.full((10, 4), 0.25)
    assert threshold_for_target(probs_TE, 1.5) == 0.25


@pytest.mark.parametrize(
    ("num_experts", "target", "published"), [(16, 2, 0.333), (64, 8, 0.416), (128, 16, 0.428)]
)
def test_initial_threshold_reproduces_the_design(
    num_experts: int, target: int, published: float
) -> None:
    """0.001 is the sampling error of the design's figures: 25 million logits give 0.3321, 0.4154
    and 0.4281."""
    assert initial_threshold(num_experts, target) == pytest.approx(published, abs=1.1e-3)


@pytest.mark.parametrize(("normalized", "scale"), [(True, 1.7), (False, 0.64)])
def test_initial_threshold_and_slope_on_other_logits(normalized: bool, scale: float) -> None:
    """Against fresh logits that share no code with the package."""
    logits = np.random.RandomState(99).randn(30_000, 32)
    if normalized:
        logits = (logits - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)
    weights = np.exp(scale * logits)
    sums = np.cumsum(np.sort(weights / weights.sum(1, keepdims=True))[:, ::-1], axis=1)

    def mean(threshold: float) -> float:
        return float(1 + (sums[:, :-1] <= threshold).sum(1).mean())

    operating_point = (32, 4, scale, normalized, None, scale)
    threshold = initial_threshold(*operating_point)
    assert mean(threshold) == pytest.approx(4, rel=0.01)
    slope = (mean(threshold + 0.02) - mean(threshold - 0.02)) / 0.04
    assert plant_slope(*operating_point) == pytest.approx(slope, rel=0.03)


def test_normalization_removes_the_standard_deviation() -> None:
    assert initial_threshold(16, 2, logits_std=0.1) == initial_threshold(16, 2, logits_std=5.0)


def test_cap_raises_the_threshold() -> None:
    """With at most 2 experts for a token, more tokens must use 2 to reach the mean of 1.9."""
    assert initial_threshold(16, 1.9, max_experts=2) > initial_threshold(16, 1.9)


def test_default_gains_give_the_loop_gains() -> None:
    gain_p, gain_i = default_gains(64, 8)
    slope = plant_slope(64, 8)
    assert gain_p * slope / 64 == pytest.approx(PROPORTIONAL_LOOP_GAIN)
    assert gain_i * slope / 64 == pytest.approx(INTEGRAL_LOOP_GAIN)
    assert gain_margin(gain_p, gain_i, slope, 64) == pytest.approx(
        2 / (2 * PROPORTIONAL_LOOP_GAIN + INTEGRAL_LOOP_GAIN)
    )
    assert gain_margin(0.0, 0.0, slope, 64) == math.inf


@pytest.mark.parametrize(
    ("num_experts", "target"), [(2, 1.5), (16, 1), (16, 1.05), (16, 16), (64, 63), (512, 2)]
)
def test_gains_are_usable_at_the_edges(num_experts: int, target: float) -> None:
    assert all(0 < gain < 10 for gain in default_gains(num_experts, target))


def test_one_usable_expert_leaves_nothing_to_control() -> None:
    assert (initial_threshold(1, 1), plant_slope(1, 1), default_gains(1, 1)) == (0, 0, (0, 0))
    assert default_gains(8, 1, max_experts=1) == (0, 0)


def test_nearly_equal_logits_give_the_mean_slope_of_the_staircase() -> None:
    """Equal probabilities gain an expert per 1 / E of threshold: a slope of E."""
    assert plant_slope(16, 2.5, logits_std=1e-3, normalized=False) == pytest.approx(16, rel=0.01)


@pytest.mark.slow
def test_deterministic_across_processes_and_threads_and_fast() -> None:
    start = time.process_time()
    here = initial_threshold(512, 20), default_gains(512, 20)
    assert time.process_time() - start < 2  # about 0.25 s on one quiet core
    code = (
        "import torch; torch.set_num_threads(2); torch.manual_seed(5);"
        "from megatron_dynmoe.control import *;"
        "print((initial_threshold(512, 20), default_gains(512, 20)))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here)


def test_global_generators_are_not_touched() -> None:
    before = (
        torch.get_rng_state(),
        np.random.get_state(legacy=False)["state"]["key"],
        random.getstate(),
    )
    initial_threshold(24, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], before[1])
    assert random.getstate() == before[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.9}, "target is 0.9"),
        ({"target": 16.5}, "target is 16.5"),
        ({"target": math.nan}, "target is nan"),
        ({"target": 5, "max_experts": 4}, "target is 5.*between 1 and 4"),
        ({"target": 2, "max_experts": 0}, "max_experts is 0"),
        ({"target": 2, "logits_std": 0.0, "normalized": False}, "logits_std is 0.0"),
        ({"target": 2, "theta": -1.0}, "theta is -1.0"),
        ({"target": 1, "num_experts": 0}, "num_experts is 0"),
    ],
)
def test_refused_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        default_gains(**({"num_experts": 16} | arguments))


def test_threshold_for_target_refuses_an_impossible_target() -> None:
    with pytest.raises(ValueError, match="target is 9"):
        threshold_for_target(random_probs(4, 8, seed=0), 9)
