"""Memory against Megatron's own estimates, and what flags do to it.

What real trainings allocate is compared in tests/distributed/test_planning.py.
"""

import pytest

from megatron_dynmoe.jobs.parse import read_args
from megatron_dynmoe.jobs.recipes import recipe_flags
from megatron_dynmoe.planning.layout import Layout
from megatron_dynmoe.planning.shape import active_parameters, layers_of, total_parameters

pytestmark = pytest.mark.megatron
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def upstream_args(recipe: str, flags: str, num_gpus: int):
    words = [*recipe_flags(recipe), *flags.split()]
    args, layout = read_args(words), Layout.from_flags(words, num_gpus)
    args.world_size, args.data_parallel_size = num_gpus, layout.data
    args.virtual_pipeline_model_parallel_size = None
    args.expert_tensor_parallel_size = layout.expert_tensor
    return args


@pytest.mark.parametrize(
    ("recipe", "flags", "num_gpus"),
    [
        ("dense_374m", "", 16),
        ("dense_570m", "--pipeline-model-parallel-size 1", 8),
        ("dense_570m", "--tensor-model-parallel-size 2", 16),
        ("dense_374m", "--group-query-attention --num-query-groups 4", 2),
        ("dtop_p_16e", "--expert-model-parallel-size 4", 16),
        ("dtop_p_64e8a", "", 16),
    ],
)
def test_state_agrees_with_megatron(memory_model, recipe, flags, num_gpus):
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    estimate = compute_weight_and_optimizer_memory(upstream_args(recipe, flags, num_gpus))
    model = memory_model(recipe, flags, num_gpus)
    ours = max(sum(model.state(stage)) for stage in range(model.layout.pipeline))
    # Not in Megatron's: the final norm's stage, and the scale of each router.
    assert ours == pytest.approx(estimate, rel=2e-4)


def test_activations_of_a_dense_model_are_near_megatrons(memory_model):
    """Its formula is for a layer without gated activation and rotary positions: 29 against 38.5
    bytes of each hidden value."""
    from megatron.training.theoretical_memory_usage import compute_activation_memory

    flags = "--pipeline-model-parallel-size 1"
    estimate = compute_activation_memory(upstream_args("dense_374m", flags, 8), None)
    ours = memory_model("dense_374m", flags, 8).fullest(0)[1].activations
    assert 1.1 * estimate < ours < 1.5 * estimate


def test_published_sizes(memory_model):
    shape = memory_model("moe_top2").shape
    assert total_parameters(shape) == pytest.approx(3.5e9, rel=0.01)
    assert active_parameters(shape, 2) == pytest.approx(581e6, rel=0.01)
    assert active_parameters(shape, 1) == pytest.approx(374e6, rel=0.01)


def test_smaller_micro_batches_recomputation_and_expert_parallelism_save_memory(memory_model):
    usual = memory_model("dtop_p_16e").fullest(2)[1]
    assert memory_model("dtop_p_16e", "--micro-batch-size 2").fullest(2)[1].activations < (
        0.6 * usual.activations
    )
    recomputed = memory_model("dtop_p_16e", FULL).fullest(2)[1]
    assert recomputed.total - recomputed.state < 0.3 * (usual.total - usual.state)
    spread = memory_model("dtop_p_16e", "--expert-model-parallel-size 8").fullest(2)[1]
    assert spread.weights < 0.3 * usual.weights


def test_every_selective_module_saves_something(memory_model):
    flags = "--recompute-granularity selective --recompute-modules"
    shared = "--moe-shared-expert-intermediate-size 512 --moe-layer-freq 2"

    def total(more: str) -> float:
        return memory_model("dtop_p_16e", f"{shared} {more}").fullest(2)[1].total

    for module in ("layernorm", "mlp", "moe", "shared_experts"):
        assert total(f"{flags} {module}") < total("")
    # Flash attention keeps nothing that the projection after it does not keep, too.
    assert total(f"{flags} core_attn") == total("")


def test_block_recomputation_lies_between_none_and_all(memory_model):
    flags = "--recompute-granularity full --recompute-method block --recompute-num-layers"
    sizes = [memory_model("dtop_p_16e", FULL)]
    sizes += [memory_model("dtop_p_16e", f"{flags} {number}") for number in (12, 6, 2)]
    sizes.append(memory_model("dtop_p_16e"))
    totals = [size.fullest(2)[1].total for size in sizes]
    assert totals == sorted(totals)


def test_stages_hold_their_layers(memory_model):
    model = memory_model(
        "dtop_p_16e",
        "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 3",
        8,
    )
    each = [layers_of(model.shape, model.layout, stage) for stage in range(4)]
    assert each[1] == [2, 3, 10, 11, 18, 19]
    assert sorted(layer for layers in each for layer in layers) == list(range(24))


def test_the_first_pipeline_rank_holds_most_micro_batches(memory_model):
    model = memory_model("dtop_p_16e", "--pipeline-model-parallel-size 8", 16)
    assert model.fullest(2)[0] == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--multi-latent-attention", "--multi-latent-attention is given"),
        ("--optimizer muon", "--optimizer is muon"),
        ("--num-layers-per-virtual-pipeline-stage 2", "per-virtual-pipeline-stage is 2"),
    ],
)
def test_what_is_not_known_is_refused(memory_model, flags, words):
    with pytest.raises(ValueError, match=words):
        memory_model("dense_374m", flags)


def test_tokens_of_a_rank_are_split_with_its_sequence(memory_model):
    parallel = "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2"
    assert memory_model("dtop_p_16e").local_tokens == 4 * 2048
    assert memory_model("dtop_p_16e", parallel).local_tokens == 2048
