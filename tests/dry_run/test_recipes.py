"""Dry runs of every recipe as it stands, on as few GPUs as it takes, and of what users add."""

import pytest

from megatron_dynmoe.dry_run import launch
from megatron_dynmoe.jobs.recipes import recipe_names
from megatron_dynmoe.planning.gpus import GPUS

pytestmark = [pytest.mark.megatron, pytest.mark.long]
# Whatever --global-batch-size is, a dry run takes as long: a few micro-batches stand for all.
LONG_TEXT = "--seq-length 32768 --max-position-embeddings 32768 --micro-batch-size 1"
ELSEWHERE = {
    "DeepEP": (
        "dtop_p_64e8a",
        "--moe-token-dispatcher-type flex --moe-dynamic-max-experts-per-token 32",
    ),
    "long": ("dtop_p_64e8a", f"{LONG_TEXT} --cp-comm-type a2a --context-parallel-size 4"),
    "worst case": (
        "dtop_p_16e",
        "--moe-dynamic-max-experts-per-token 4 --moe-dynamic-row-buffer worst_case",
    ),
    "tensor": ("dtop_p_16e", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "interleaved": ("moe_top2", "--num-virtual-stages-per-pipeline-rank 3"),
    "recomputed": (
        "dtop_p_16e",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}


def dry_run(recipe, flags="", kernels="0"):
    return launch.dry_run(recipe, flags.split(), None, GPUS["h200-141g"], kernels=kernels)


def waits_of_a_layer(run):
    return sum(wait.count for wait in run.result.waits if wait.per.startswith("layer"))


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe(recipe):
    run = dry_run(recipe)
    assert run.result.mistakes == []
    assert waits_of_a_layer(run) == (1 if run.layout.num_experts else 0)
    assert run.formula.total == pytest.approx(run.result.peak, rel=0.1)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_users_add(name):
    run = dry_run(*ELSEWHERE[name])
    assert run.result.mistakes == []
    if name not in ("DeepEP", "recomputed"):  # upstream's code for the former waits more often
        assert waits_of_a_layer(run) == (0 if name == "worst case" else 1)
    if name != "DeepEP":
        assert run.formula.total == pytest.approx(run.result.peak, rel=0.15)
