"""A target that is drawn for each global batch, in trainings: every step follows the law."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_dynmoe.control import MapController
from megatron_dynmoe.control.settle import settle
from megatron_dynmoe.conversion.convert import Target, from_hf, to_hf
from megatron_dynmoe.conversion.megatron.checkpoint import checkpoint_folder
from megatron_dynmoe.data.finding import FAILED, PASSED
from megatron_dynmoe.doctor.checkpoint.look import look
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.distribution import TargetDistribution
from tests.distributed.agreement import tensors
from tests.distributed.harness import TINY, Case, CaseResult, Results, add
from tests.doctor.planting import edit

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

FAULTS = "tests.distributed.faults"
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
        f"--save {{dir}}/drawn_saved --save-interval {STEPS} --ckpt-format torch_dist "
        "--split 1,0,0 --tensorboard-dir {dir}/drawn",
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


def test_the_export_has_the_map_as_its_budget_curve(results: Results, tmp_path: Path) -> None:
    result = results[FOLLOWS]
    saved = result.directory / "drawn_saved"
    to_hf(saved, Target(tmp_path / "hf"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    curve = config["budget_curve"]
    map_K = result.by_layer("map")[-1][1]
    assert [point["loss"] for point in curve] == [None] * len(curve)
    budgets = [point["experts_per_token"] for point in curve]
    assert (budgets[0], budgets[-1]) == (DRAWN.low, DRAWN.high)
    assert budgets == sorted(set(budgets))
    for point in curve:
        expected = by_hand(map_K, point["experts_per_token"])
        assert point["threshold"] == pytest.approx(expected, abs=1e-6)
    # Without a budget, an export routes at the mean target.
    at_mean = by_hand(map_K, DRAWN.mean)
    assert config["threshold"] == pytest.approx([at_mean] * 4, abs=1e-6)
    assert config["target_experts_per_token"] == str(DRAWN)
    from_hf(tmp_path / "hf", tmp_path / "back", progress=False)
    before, after = (tensors(checkpoint_folder(path, None)) for path in (saved, tmp_path / "back"))
    of_model = {name for name in before if name.startswith(("decoder.", "embedding.", "output_"))}
    assert sum(".knot_" in name for name in of_model) == 3
    assert all(torch.equal(before[name], after[name]) for name in of_model)


def damaged_order(map_LK: torch.Tensor) -> None:
    map_LK[2] = map_LK[2].flip(0)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("knot_thresholds", damaged_order, "knot_thresholds of layer 2 are .*: they have to be in"),
        ("knot_thresholds", lambda map_LK: map_LK.mul_(0.98), "threshold is not that of the knots"),
        ("knot_thresholds", lambda map_LK: map_LK[:, 0].sub_(0.01), "they are not of one step"),
        ("knot_integrals", lambda sums_LK: sums_LK[:, 0].add_(0.1), "they are not of one step"),
        ("knot_targets", lambda targets: targets.add_(1), r"are not those of uniform\(1,4\)"),
        ("knot_integrals", lambda sums_LK: sums_LK[1].fill_(math.nan), "is missing, or not finite"),
    ],
)
def test_the_doctor_knows_the_map(
    results: Results, tmp_path: Path, name: str, damage: Callable[..., object], words: str
) -> None:
    saved = results[FOLLOWS].directory / "drawn_saved"
    folder = shutil.copytree(saved, tmp_path / "run") / checkpoint_folder(saved, None).name
    assert {check.state for check in look(folder)} == {PASSED}
    edit(folder, f"decoder.layers.mlp.router.{name}", damage)
    found = [check.found for check in look(folder) if check.state == FAILED]
    assert any(re.search(words, text) for text in found), found


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
