"""Dry runs of a small model as one of 128 ranks: the first, one of the middle, the last."""

import functools
import json

import pytest

from megatron_dynmoe.cli.plan import dry_run_to_json
from megatron_dynmoe.dry_run import display, launch
from megatron_dynmoe.planning.gpus import GPUS

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

# Four stages of one layer, each of 16 x 2 GPUs, two of which share their experts.
PIPELINE = (
    "--num-layers 4 --pipeline-model-parallel-size 4 --expert-model-parallel-size 2 --bf16 "
    "--use-distributed-optimizer --overlap-grad-reduce --micro-batch-size 1 "
    "--global-batch-size 160 --moe-dynamic-max-experts-per-token 4 "
    "--moe-dynamic-initial-threshold 0.7"
)
FIRST, MIDDLE, LAST = 0, 64, 127
# The first one's experts get 1.5 times their share of the first steps' rows.
COUNTS = {
    FIRST: {"counts": "first", "imbalance": 1.5},
    MIDDLE: {"counts": "cap"},
    LAST: {},
}
of_each_rank = pytest.mark.parametrize(
    "rank",
    [
        pytest.param(FIRST, marks=pytest.mark.long),
        MIDDLE,
        pytest.param(LAST, marks=pytest.mark.long),
    ],
)


@functools.cache
def dry_run(rank):
    gpu = GPUS["a800-80g"]
    return launch.dry_run(
        "smoke", PIPELINE.split(), 128, gpu, rank=rank, kernels="0", **COUNTS[rank]
    )


@of_each_rank
def test_each_rank_has_its_stage_and_its_layer(rank):
    run, stage = dry_run(rank), rank // 32
    assert (run.rank, run.stage, run.result.layers) == (rank, stage, [stage + 1])
    text = display.describe(run)
    assert text.startswith(f"smoke on 128 x A800 80 GB, a dry run of rank {rank}\n")
    assert f"pipeline rank {stage} of 4, layer {stage + 1}\n" in text
    assert run.result.mistakes == []
    assert run.result.micro_batches == 5


@pytest.mark.long
def test_only_a_stage_between_others_sends_both_ways():
    first, middle, last = (
        sum(each.calls for each in dry_run(rank).result.sent if each.group.startswith("PIPELINE"))
        for rank in COUNTS
    )
    assert first == last == middle / 2 > 0


@of_each_rank
def test_gradients_are_reduced_over_the_ranks_that_share_them(rank):
    sent = dry_run(rank).result.sent
    assert {each.size for each in sent if each.kind == "reduce-scatter"} == {32, 16}  # all, experts
    (counts,) = [each for each in sent if "control/update.py" in each.line]
    assert (counts.kind, counts.size, counts.calls) == ("all-reduce", 128, 1)


@pytest.mark.long
def test_the_loss_is_the_last_ones_alone():
    middle, last = dry_run(MIDDLE).result, dry_run(LAST).result

    def waits_for_the_loss(result):
        return [wait for wait in result.waits if "rerun_state_machine" in wait.line]

    assert len(waits_for_the_loss(last)) > len(waits_for_the_loss(middle))
    assert last.kernels_outside.forward > middle.kernels_outside.forward


@of_each_rank
def test_the_planner_is_near_on_every_rank(rank):
    run = dry_run(rank)
    assert run.formula.total == pytest.approx(run.result.peak, rel=0.15)


@of_each_rank
def test_counts_that_are_not_the_mean_are_in_the_json(rank):
    run = json.loads(json.dumps(dry_run_to_json(dry_run(rank))))
    expected = run["expected"]
    assert expected["cap"] == 4 and expected["mean"] == 2 < expected["first_steps"] < 4
    assert (run["experts_per_token"], run["counts"], run["imbalance"]) == {
        FIRST: (expected["first_steps"], "the first steps'", 1.5),
        MIDDLE: (4, "the cap", 1),
        LAST: (2, "the target", 1),
    }[rank]
    assert run["rank"] == rank
    assert run["peak"] == max(run["result"]["peak_bytes"].values())
