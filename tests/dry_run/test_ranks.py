"""Dry runs of a small model as one of 128 ranks: the first, one of the middle, the last."""

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


def dry_run(rank, **options):
    gpu = GPUS["a800-80g"]
    return launch.dry_run("smoke", PIPELINE.split(), 128, gpu, rank=rank, kernels="0", **options)


@pytest.fixture(scope="module")
def first():
    """Rank 0, whose experts get 1.5 times their share of the first steps' rows."""
    return dry_run(0, counts="first", imbalance=1.5)


@pytest.fixture(scope="module")
def middle():
    return dry_run(64, counts="cap")


@pytest.fixture(scope="module")
def last():
    return dry_run(127)


def test_each_rank_has_its_stage_and_its_layer(first, middle, last):
    for run, rank, stage in ((first, 0, 0), (middle, 64, 2), (last, 127, 3)):
        assert (run.rank, run.stage, run.result.layers) == (rank, stage, [stage + 1])
        text = display.describe(run)
        assert text.startswith(f"smoke on 128 x A800 80 GB, a dry run of rank {rank}\n")
        assert f"pipeline rank {stage} of 4, layer {stage + 1}\n" in text
        assert run.result.mistakes == []
        assert run.result.micro_batches == 5


def test_only_a_stage_between_others_sends_both_ways(first, middle, last):
    def to_neighbors(run):
        return sum(each.calls for each in run.result.sent if each.group.startswith("PIPELINE"))

    assert to_neighbors(first) == to_neighbors(last) == to_neighbors(middle) / 2 > 0


def test_gradients_are_reduced_over_the_ranks_that_share_them(first, middle, last):
    for run in (first, middle, last):
        sizes = {each.size for each in run.result.sent if each.kind == "reduce-scatter"}
        assert sizes == {32, 16}  # of what all have, of experts
        (counts,) = [each for each in run.result.sent if "control/update.py" in each.line]
        assert (counts.kind, counts.size, counts.calls) == ("all-reduce", 128, 1)


def test_the_loss_is_the_last_ones_alone(first, middle, last):
    def waits_for_the_loss(run):
        return [wait for wait in run.result.waits if "rerun_state_machine" in wait.line]

    assert len(waits_for_the_loss(last)) > len(waits_for_the_loss(middle))
    assert last.result.kernels_outside.forward > middle.result.kernels_outside.forward


def test_the_planner_is_near_on_every_rank(first, middle, last):
    for run in (first, middle, last):
        assert run.formula.total == pytest.approx(run.result.peak, rel=0.15)


def test_counts_that_are_not_the_mean_are_in_the_json(first, middle, last):
    told = [json.loads(json.dumps(dry_run_to_json(run))) for run in (first, middle, last)]
    for run in told:
        assert run["expected"]["cap"] == 4 and run["expected"]["mean"] == 2
    first_steps = told[0]["expected"]["first_steps"]
    assert 2 < first_steps < 4
    assert [run["experts_per_token"] for run in told] == [first_steps, 4, 2]
    assert [run["counts"] for run in told] == ["the first steps'", "the cap", "the target"]
    assert [run["imbalance"] for run in told] == [1.5, 1, 1]
    assert [run["rank"] for run in told] == [0, 64, 127]
    assert all(run["peak"] == max(run["result"]["peak_bytes"].values()) for run in told)
