"""The planner's figures against what trainings allocate."""

import shlex
from pathlib import Path

import pytest

from megatron_dynmoe.jobs.parse import read_args
from megatron_dynmoe.jobs.recipes import recipe_flags
from megatron_dynmoe.planning.layout import Layout
from megatron_dynmoe.planning.memory import MemoryModel
from megatron_dynmoe.settings.arguments import resolved_from_args
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

SHARDED = "--use-distributed-optimizer"
STATE = ("tests.distributed.planning_cases:measure_state",)
PEAK = ("tests.distributed.planning_cases:measure_peak",)
ALL_TO_THE_FIRST = ("tests.distributed.planning_cases:all_to_the_first_experts", *PEAK)
# Enough tokens and width that activations are most of what a step allocates.
WIDE = (
    f"{TINY} --moe-dynamic-routing top_p --moe-dynamic-threshold 1 --train-iters 2 "
    "--moe-token-dispatcher-type alltoall --hidden-size 64 --ffn-hidden-size 96 --seq-length 256 "
    "--max-position-embeddings 256"
)
SMOKE = f"{shlex.join(recipe_flags('smoke'))} --train-iters 1 --lr-warmup-iters 0"


def state(name: str, num_ranks: int, flags: str) -> Case:
    return add(Case(f"planned_{name}", num_ranks, flags, hooks=STATE))


# Large enough that what a file adds to each tensor does not count.
SAVED = state(
    "saved",
    2,
    f"{TINY} {DTOP_P} --hidden-size 128 --ffn-hidden-size 256 --train-iters 1 --bf16 {SHARDED} "
    "--save {dir}/planned --save-interval 5",
)
STATES = [
    SAVED,
    state("smoke", 2, f"{SMOKE} {SHARDED} --moe-dynamic-routing null_experts"),
    state("smoke_pp2", 2, f"{SMOKE} --pipeline-model-parallel-size 2 --bf16"),
    state("ep2_sharded", 4, f"{TINY} {DTOP_P} --expert-model-parallel-size 2 --bf16 {SHARDED}"),
    state(
        "tp2",
        2,
        f"{TINY} {DTOP_P} --tensor-model-parallel-size 2 --sequence-parallel --qk-layernorm "
        "--expert-tensor-parallel-size 1 --group-query-attention --num-query-groups 2",
    ),
    state(
        "other_parts",
        1,
        f"{TINY} --moe-router-topk 2 --moe-layer-freq [0,1,0,1] --add-qkv-bias "
        "--moe-shared-expert-intermediate-size 48 --normalization LayerNorm "
        "--position-embedding-type learned_absolute",
    ),
]
PEAKS = [
    add(Case(f"planned_peak_{name}", ranks, f"{WIDE} {flags}", hooks=PEAK))
    for name, ranks, flags in (
        ("capped", 1, "--moe-dynamic-max-experts-per-token 2"),
        ("ep2", 2, "--expert-model-parallel-size 2 --global-batch-size 4"),
        (
            "recompute",
            1,
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ),
    )
]
# Of 8 experts each rank holds 4, and the first rank gets all rows of both.
ONE_RANK_PEAKS = {
    add(
        Case(
            f"planned_peak_one_rank_{cap}",
            2,
            f"{WIDE} --expert-model-parallel-size 2 --global-batch-size 4 "
            f"--moe-dynamic-max-experts-per-token {cap}",
            hooks=ALL_TO_THE_FIRST,
        )
    ): cap
    for cap in (1, 4)
}


def planned(case: Case) -> MemoryModel:
    flags = [*shlex.split(case.flags), "--no-bias-swiglu-fusion"]  # there is no compiler on the CPU
    args = read_args(flags)
    layout = Layout.from_flags(flags, case.num_ranks)
    return MemoryModel.from_args(args, layout, resolved_from_args(args, args.num_experts))


@pytest.mark.parametrize("case", STATES, ids=lambda case: case.name)
def test_parameters_and_their_state_are_those_of_a_run(results: Results, case: Case):
    model = planned(case)
    ranks_per_stage = case.num_ranks // model.layout.pipeline
    for rank, result in enumerate(results[case].ranks):
        measured = result["state"]
        weights, gradients, _ = model.state(rank // ranks_per_stage)
        assert measured["weights"] == weights
        # Upstream pads its buffers so that ranks get equal and aligned parts.
        assert measured["gradients"] == pytest.approx(gradients, rel=0.02)
    measured = sum(rank["state"]["optimizer"] for rank in results[case].ranks)
    stages = [model.state(rank // ranks_per_stage)[2] for rank in range(case.num_ranks)]
    assert measured == pytest.approx(sum(stages), rel=0.001)


def test_checkpoint_has_the_planned_size(results: Results):
    model = planned(SAVED)
    folder = Path(results[SAVED].directory) / "planned"
    written = sum(path.stat().st_size for path in folder.rglob("*.distcp"))
    assert written == pytest.approx(model.checkpoint_bytes, rel=0.03)


@pytest.mark.parametrize("case", PEAKS, ids=lambda case: case.name)
def test_a_step_stays_below_the_worst_case(results: Results, case: Case):
    model = planned(case)
    cap = 2 if "capped" in case.name else None  # every token uses as many as the cap allows
    memory = model.worst_case(cap)[1]
    bound = memory.activations + memory.expert_rows
    assert "> memory: at most" in results[case].log(0)
    for rank in results[case].ranks:
        assert rank["peak"] <= bound <= 1.5 * rank["peak"]


@pytest.mark.parametrize("case", ONE_RANK_PEAKS, ids=lambda case: case.name)
def test_all_rows_at_one_rank_stay_below_the_worst_case(results: Results, case: Case):
    cap = ONE_RANK_PEAKS[case]
    for batch in results[case].finalized:
        assert all(row == [1024] * cap + [0] * (8 - cap) for row in batch["assignments"])
    memory = planned(case).worst_case(cap)[1]
    bound = memory.activations + memory.expert_rows
    full, empty = (rank["peak"] for rank in results[case].ranks)
    assert empty < full <= bound <= 1.5 * full
