"""A target that is drawn for each global batch, in trainings: every step follows the law."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dynmoe.control import MapController
from megatron_dynmoe.control.settle import settle
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.distribution import TargetDistribution
from tests.distributed.harness import TINY, Case, CaseResult, Results, add
from tests.distributed.test_control import FAULTS

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

NUM_EXPERTS = 8
DRAWN = TargetDistribution(1, 4, seed=7)
FLAGS = f"{TINY} --moe-dynamic-routing dtop_p --moe-dynamic-target-experts-per-token {DRAWN}"
FLAGS += f" --seed {DRAWN.seed}"

STEPS = 64
FOLLOWS = add(
    Case(
        "drawn_follows",
        1,
        f"{FLAGS} --lr 3e-4 --min-lr 3e-4 --train-iters {STEPS} --log-interval {STEPS // 2} "
        "--tensorboard-dir {dir}/drawn",
    )
)
SKIPPED = add(
    Case(
        "drawn_skipped",
        2,
        f"{FLAGS} --train-iters 4 --pipeline-model-parallel-size 2 --moe-dynamic-check-ranks 1",
        hooks=(f"{FAULTS}:second_step_is_skipped",),
    )
)
BY_LAYER = add(
    Case(
        "drawn_by_layer",
        2,
        f"{FLAGS} --train-iters 4 --pipeline-model-parallel-size 2 --moe-dynamic-scope layer",
    )
)
BUSIEST_RANK = add(
    Case(
        "drawn_busiest_rank",
        2,
        f"{FLAGS} --train-iters 4 --expert-model-parallel-size 2 "
        "--moe-token-dispatcher-type alltoall --moe-dynamic-controlled-quantity busiest_rank "
        "--moe-dynamic-max-experts-per-token 5",
    )
)


def law_of(cap: int | None = None) -> MapController:
    """The law of these runs, whose arithmetic tests/control checks against float64."""

    class Sizes:
        num_moe_experts, hidden_size, init_method_std = NUM_EXPERTS, 32, 0.02

    given = DynMoEConfig(
        routing="dtop_p", target_experts_per_token=DRAWN, max_experts_per_token=cap
    )
    law = settle(given.resolve(NUM_EXPERTS), Sizes)[1]
    assert isinstance(law, MapController)
    return law


def by_hand(map_K: list[float], target: float) -> float:
    """Read a map, in Python's floats."""
    position = 4 * math.log(target / DRAWN.low) / math.log(DRAWN.high / DRAWN.low)
    knot = min(int(position), 3)
    return map_K[knot] + (position - knot) * (map_K[knot + 1] - map_K[knot])


def assert_follows(
    result: CaseResult, measured: list[float], layer: int, skipped: tuple[int, ...] = ()
) -> None:
    """Thresholds in force, and the map after each step, from the measured counts."""
    law = law_of()
    map_K, sums_K = torch.tensor([law.initial_map]), torch.zeros(1, len(law.knots))
    for step, count in enumerate(measured):
        target = DRAWN.at(step)
        batch = result.finalized[step]
        in_force = batch["knobs"][layer] / batch["routers"][layer]
        assert in_force == pytest.approx(by_hand(map_K[0].tolist(), target), abs=1e-6)
        if step not in skipped:
            map_K, sums_K = law.step(map_K, sums_K, torch.tensor([count]), target)
        assert result.by_layer("map")[step][layer + 1] == pytest.approx(map_K[0].tolist(), abs=2e-6)
        at_mean = by_hand(map_K[0].tolist(), DRAWN.mean)
        assert result.by_layer("threshold")[step][layer + 1] == pytest.approx(at_mean, abs=2e-6)


def test_every_step_follows_the_law(results: Results) -> None:
    result = results[FOLLOWS]
    assert_follows(result, result.experts_per_token, layer=0)
    assert_follows(result, result.experts_per_token, layer=3)


def test_measured_counts_follow_the_drawn_targets(results: Results) -> None:
    targets = torch.tensor([DRAWN.at(step) for step in range(STEPS)])
    measured = torch.tensor(results[FOLLOWS].experts_per_token)
    late = slice(STEPS // 2, None)
    assert targets.std() > 0.8
    # The routers learn at once what there is to learn in this text, and the counts lag behind.
    assert (measured - targets)[late].mean().abs() < 0.1
    assert (measured - targets)[late].square().mean().sqrt() < 0.15
    assert torch.corrcoef(torch.stack([targets, measured]))[0, 1] > 0.98


def test_targets_are_logged_beside_the_counts(results: Results) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = results[FOLLOWS]
    events = EventAccumulator(str(result.directory / "drawn"), size_guidance={"scalars": 0})
    events.Reload()
    logged = [event.value for event in events.Scalars("dynmoe/target_experts_per_token")]
    assert logged == pytest.approx([DRAWN.at(step) for step in range(STEPS)])
    half = STEPS // 2
    for first in (0, half):
        mean = sum(DRAWN.at(step) for step in range(first, first + half)) / half
        assert f"(target {mean:.4f})" in result.log()


def test_after_a_skipped_step_the_next_target_is_read_from_the_same_map(results: Results) -> None:
    result = results[SKIPPED]
    assert [step["skipped"] for step in result.ranks[-1]["steps"]] == [False, True, False, False]
    assert_follows(result, result.experts_per_token, layer=3, skipped=(1,))


def test_each_layer_may_have_its_own_map(results: Results) -> None:
    result = results[BY_LAYER]
    for layer in range(4):
        measured = [
            sum(batch["assignments"][layer]) / batch["tokens"][layer] for batch in result.finalized
        ]
        assert_follows(result, measured, layer)
    assert len({tuple(map_K) for map_K in result.by_layer("map")[-1].values()}) == 4


def test_the_busiest_rank_may_be_held_at_a_drawn_target(results: Results) -> None:
    result, law = results[BUSIEST_RANK], law_of(cap=5)
    map_K, sums_K = torch.tensor([law.initial_map]), torch.zeros(1, len(law.knots))
    for step, batch in enumerate(result.finalized):
        imbalance = sum(batch["busiest_rows"]) / sum(batch["rows"])
        held = result.experts_per_token[step] * imbalance
        assert imbalance > 1
        map_K, sums_K = law.step(map_K, sums_K, torch.tensor([held]), DRAWN.at(step))
        assert result.by_layer("map")[step][1] == pytest.approx(map_K[0].tolist(), abs=2e-6)
