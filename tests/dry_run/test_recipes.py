"""Dry runs of every recipe as it stands, on as few GPUs as it takes, and of what users add."""

import pytest

from megatron_dynmoe.dry_run import launch
from megatron_dynmoe.jobs.recipes import recipe_names
from megatron_dynmoe.planning.gpus import GPUS

pytestmark = [pytest.mark.megatron, pytest.mark.long]
# Whatever --global-batch-size is, a dry run takes as long: a few micro-batches stand for all.
LONG_TEXT = "--seq-length 32768 --max-position-embeddings 32768 --micro-batch-size 1"
ACTIVATIONS = "--recompute-granularity selective --recompute-modules moe_act"
# The whole of Dynamic MoE's 3.5 B model.
ONE_GPU = ("dtop_p_16e", "--pipeline-model-parallel-size 1 --micro-batch-size 8")
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
    "target": ("dtop_p_16e", "--moe-dynamic-row-buffer target"),
    "tensor": ("dtop_p_16e", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "interleaved": ("moe_top2", "--num-virtual-stages-per-pipeline-rank 3"),
    "activations": ("dtop_p_16e", ACTIVATIONS),
    "latent attention": (
        "smoke",
        "--multi-latent-attention --kv-lora-rank 16 --q-lora-rank 16 --qk-head-dim 8 "
        "--qk-pos-emb-head-dim 8 --v-head-dim 16",
    ),
    "recomputed": (
        "dtop_p_16e",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}


def dry_run(recipe, flags="", more="", **options):
    options = {"kernels": "0"} | options
    return launch.dry_run(
        recipe, [*flags.split(), *more.split()], None, GPUS["h200-141g"], **options
    )


def flops_over_planned(run):
    return sum(run.result.flops.values()) / run.planned_flops


def waits_of_a_layer(run):
    return sum(wait.count for wait in run.result.waits if wait.per.startswith("layer"))


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe(recipe):
    run = dry_run(recipe)
    assert run.result.mistakes == []
    assert waits_of_a_layer(run) == (1 if run.layout.num_experts else 0)
    assert run.formula.total == pytest.approx(run.result.peak, rel=0.1)
    # One rank has the logits or lacks them.
    assert 0.9 < flops_over_planned(run) < 1.1


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_users_add(name):
    run = dry_run(*ELSEWHERE[name])
    assert run.result.mistakes == []
    if name not in ("DeepEP", "recomputed"):  # upstream's code for the former waits more often
        assert waits_of_a_layer(run) == (0 if name in ("worst case", "target") else 1)
    rooms = [wait for wait in run.result.waits if "row_buffer" in wait.line]
    assert [wait.per_step for wait in rooms] == [1] * (name == "target")
    # What the formula does not know: flash attention computes the scores again in its backward
    # pass, recomputation everything once more, and room for twice the rows is computed with, too.
    most = {"recomputed": 4.5 / 3, "worst case": 2}.get(name, 3.5 / 3)
    assert 0.9 < flops_over_planned(run) < most + 0.05
    if name == "latent attention":
        assert run.formula is None and "--multi-latent-attention" in run.formula_note
    elif name != "DeepEP":
        # The formula adds a whole layer and its largest step, which is more than full recomputation
        # was found to need at once: it was 15.4 % above the peak, so on the safe side.
        within = 0.16 if name == "recomputed" else 0.15
        assert run.formula.total == pytest.approx(run.result.peak, rel=within)


@pytest.mark.parametrize(
    ("kernels", "flags", "traffic", "kept"),
    [("fused", "", 1.05, 372), ("1", ACTIVATIONS, 1.45, 372), ("1", "", 1.45, 624)],
)
def test_a_layer_of_the_papers_model_on_one_gpu(kernels, flags, traffic, kept):
    """What docs/backends.md says of it; a limit may fall, and if it has to rise, say why."""
    run = dry_run(*ONE_GPU, kernels=kernels, more=flags)
    result = run.result
    assert result.mistakes == []
    assert sum(row.forward for row in result.kernels) <= 60
    assert 1 <= result.expert_traffic / run.least_expert_traffic <= traffic
    assert result.expert_kept <= kept * 1e6
    assert result.peak_bytes["optimizer"] - result.state_bytes < 0.001 * result.state_bytes
    assert 0 < result.kernels_of_controller <= 30
    norms = [wait for wait in result.waits if "clip_grads" in wait.line + wait.caller]
    assert sum(wait.per_step for wait in norms) <= 5


@pytest.mark.parametrize(
    "more", [{"counts": "cap"}, {"experts_per_token": 4}, {"imbalance": 2}, {"imbalance": 0.5}]
)
def test_more_rows_take_more_memory(more):
    """As many as the planner says, for a model most of whose memory are rows."""
    flags = "--expert-model-parallel-size 2 --ffn-hidden-size 512 --seq-length 128"
    flags += " --max-position-embeddings 128 --moe-dynamic-max-experts-per-token 6"
    usual, other = dry_run("smoke", flags), dry_run("smoke", flags, **more)
    added = other.result.peak - usual.result.peak
    assert (added < 0) == (more.get("imbalance", 1) < 1) and added != 0
    assert added == pytest.approx(other.formula.total - usual.formula.total, rel=0.25)
    assert waits_of_a_layer(other) == 1
