"""Training through Megatron's loop over parallel layouts, precisions and MoE settings.

Dropout is off and the mock data depends on the sample's index only, so that runs that should agree
do so bitwise, or up to the order in which floats are summed.
"""

import math

import pytest

from tests.distributed.agreement import GRADIENTS, assert_same_gradients, assert_same_training
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add
from tests.distributed.selection import matrix

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

TRAIN = f"{TINY} {DTOP_P}"
EP2 = "--expert-model-parallel-size 2"
EP4 = "--expert-model-parallel-size 4"
PP2 = "--pipeline-model-parallel-size 2"
INTERLEAVED = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
ALLGATHER = "--moe-token-dispatcher-type allgather"
ALLTOALL = "--moe-token-dispatcher-type alltoall"
RECOMPUTE = "--recompute-granularity selective --recompute-modules moe"
TWO_MOE_LAYERS = '--moe-layer-freq "[1,1,0,0]"'
NUM_LAYERS, NUM_EXPERTS, TOKENS = 4, 8, 8 * 32  # of a layer in a global batch


def case(name: str, num_ranks: int, flags: str, **fields) -> Case:
    return add(Case(name, num_ranks, flags, **fields))


ONE_RANK = case("one_rank", 1, f"{TRAIN} {ALLTOALL}", hooks=GRADIENTS)
DP2 = case("dp2", 2, f"{TRAIN} {ALLTOALL}", hooks=GRADIENTS)

# Weights that every layout can load.
SAVE = "--save {dir}/weights --save-interval 1 --train-iters 1"
SAVE_TWO = "--save {dir}/weights_two_moe_layers --save-interval 1 --train-iters 1"
LOAD = "--load {dir}/weights --finetune --no-load-optim --no-load-rng"
LOAD_TWO = "--load {dir}/weights_two_moe_layers --finetune --no-load-optim --no-load-rng"
SAVED = case("saved", 1, f"{TRAIN} {ALLTOALL} {SAVE}")
SAVED_TWO = case("saved_two_moe_layers", 1, f"{TRAIN} {ALLTOALL} {TWO_MOE_LAYERS} {SAVE_TWO}")


def loaded(name: str, num_ranks: int, flags: str) -> Case:
    flags = f"{TRAIN} {LOAD} {flags}"
    return case(f"loaded_{name}", num_ranks, flags, hooks=GRADIENTS, after=(SAVED,))


LOADED = loaded("one_rank", 1, ALLTOALL)
SAME_WEIGHTS = [
    loaded("ep2", 2, f"{ALLTOALL} {EP2}"),
    loaded("ep2_allgather", 2, f"{ALLGATHER} {EP2}"),
    loaded("pp2", 2, f"{ALLTOALL} {PP2}"),
    loaded("pp2_interleaved", 2, f"{ALLTOALL} {INTERLEAVED}"),
    loaded("ep4", 4, f"{ALLTOALL} {EP4}"),
    loaded("ep4_allgather", 4, f"{ALLGATHER} {EP4}"),
    loaded("pp2_ep2", 4, f"{ALLTOALL} {PP2} {EP2}"),
    loaded("pp2_ep2_interleaved", 4, f"{ALLGATHER} {INTERLEAVED} {EP2}"),
]
LOADED_TWO = case(
    "loaded_two_one_rank",
    1,
    f"{TRAIN} {LOAD_TWO} {ALLTOALL} {TWO_MOE_LAYERS}",
    hooks=GRADIENTS,
    after=(SAVED_TWO,),
)
LOADED_TWO_PP2 = case(
    "loaded_two_pp2",
    2,
    f"{TRAIN} {LOAD_TWO} {ALLTOALL} {TWO_MOE_LAYERS} {PP2}",
    hooks=GRADIENTS,
    after=(SAVED_TWO,),
)

DISTRIBUTED_OPTIMIZER = case(
    "distributed_optimizer", 2, f"{TRAIN} {ALLTOALL} --use-distributed-optimizer"
)
SHARED = "--moe-shared-expert-intermediate-size 32"
SHARED_EXPERTS = case("shared_experts", 2, f"{TRAIN} {ALLTOALL} {EP2} {SHARED}")
SHARED_OVERLAP = case(
    "shared_overlap", 2, f"{TRAIN} {ALLTOALL} {EP2} {SHARED} --moe-shared-expert-overlap"
)
TOP_P = case(
    "top_p_ep2",
    2,
    f"{TINY} {ALLTOALL} {EP2} --moe-dynamic-routing top_p --moe-dynamic-threshold 0.3",
)
TOP_K = case(
    "top_k_ep2",
    2,
    f"{TINY} {ALLTOALL} {EP2} --moe-router-topk 2 --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2",
)
CAP = case(
    "cap",
    1,
    f"{TINY} {ALLTOALL} --moe-dynamic-routing dtop_p --moe-dynamic-target-experts-per-token 1.5 "
    "--moe-dynamic-max-experts-per-token 2",
)
# By tokens: 2 batches of 4 samples, then 2 of 8. Megatron counts in samples if the size changes.
BATCH_SIZE_SCHEDULE = case(
    "batch_size_schedule",
    1,
    f"{TRAIN} {ALLTOALL}".replace("--train-iters 3", "--train-samples 24")
    .replace("--lr-warmup-iters 0", "--lr-warmup-samples 0")
    .replace("--global-batch-size 8", '--step-batch-size-schedule "0:4 256:8"'),
)

# Null slots that copy the token, under every kind of layout, with one bias for the layers of all
# pipeline ranks. The default scope of their balance loss, the global batch so far, depends on how
# many ranks share it.
NULLS = (
    f"{TINY} --moe-dynamic-routing null_experts --moe-dynamic-target-experts-per-token 2 "
    "--moe-dynamic-scope global --moe-dynamic-balance-loss seq_aux_loss"
)
NULLS_SAVED = case("nulls_saved", 1, f"{NULLS} {ALLTOALL} {SAVE}".replace("/weights", "/nulls"))


def with_nulls(name: str, num_ranks: int, flags: str) -> Case:
    load = LOAD.replace("/weights", "/nulls")
    flags = f"{NULLS} --moe-dynamic-null-kind identity {load} {flags}"
    return case(f"nulls_{name}", num_ranks, flags, hooks=GRADIENTS, after=(NULLS_SAVED,))


NULLS_ONE = with_nulls("one_rank", 1, ALLTOALL)
NULLS_MANY = [
    with_nulls("pp2_ep2_recomputed", 4, f"{ALLTOALL} {PP2} {EP2} {RECOMPUTE}"),
    with_nulls("ep2_allgather", 2, f"{ALLGATHER} {EP2}"),
    with_nulls("tp2", 2, f"{ALLTOALL} --tensor-model-parallel-size 2 --sequence-parallel"),
    with_nulls("cp2", 2, f"{ALLTOALL} --context-parallel-size 2 --cp-comm-type a2a"),
]

QUICK = ("loaded_ep2", "loaded_ep2_allgather", "loaded_pp2_interleaved", "loaded_pp2_ep2")
TRAINED = [ONE_RANK, DP2, DISTRIBUTED_OPTIMIZER, SHARED_EXPERTS, SHARED_OVERLAP]
TRAINED += [
    TOP_P,
    CAP,
    BATCH_SIZE_SCHEDULE,
    LOADED,
    *matrix(SAME_WEIGHTS, QUICK),
    LOADED_TWO,
    LOADED_TWO_PP2,
]


@pytest.mark.parametrize("trained", [*TRAINED, TOP_K], ids=lambda case: case.name)
def test_every_layout_trains(results: Results, trained: Case) -> None:
    losses = results[trained].losses
    assert len(losses) >= 3
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("trained", TRAINED, ids=lambda case: case.name)
def test_every_layout_counts_each_token_once(results: Results, trained: Case) -> None:
    result = results[trained]
    has_experts = [True] * 2 + [trained not in (LOADED_TWO, LOADED_TWO_PP2)] * 2
    for step, batch in enumerate(result.finalized):
        tokens = TOKENS / 2 if trained is BATCH_SIZE_SCHEDULE and step < 2 else TOKENS
        assert batch["tokens"] == [tokens * layer for layer in has_experts]
        for layer, assignments in enumerate(batch["assignments"]):
            assert len(assignments) == NUM_EXPERTS
            assert tokens <= sum(assignments) <= tokens * NUM_EXPERTS or not has_experts[layer]
    # The counters are cleared for the next batch.
    assert all(not any(counted.values()) for counted in result.by_layer("counted"))


@pytest.mark.parametrize("trained", TRAINED, ids=lambda case: case.name)
def test_all_ranks_hold_the_same_threshold(results: Results, trained: Case) -> None:
    result = results[trained]
    if trained is TOP_P:
        assert len(set(result.thresholds)) == 1
    else:
        assert len(set(result.thresholds)) == len(result.thresholds)  # it moves
    num_routers = 2 if trained in (LOADED_TWO, LOADED_TWO_PP2) else NUM_LAYERS
    assert [list(step) for step in result.by_layer("theta")] == [
        list(range(1, num_routers + 1)) for _ in result.losses
    ]


def test_data_parallel_equals_one_rank(results: Results) -> None:
    one, dp2 = results[ONE_RANK], results[DP2]
    assert_same_gradients(one, dp2)
    assert dp2.losses == pytest.approx(one.losses, rel=1e-5)
    assert dp2.assignments == one.assignments
    assert dp2.thresholds == one.thresholds


def test_the_distributed_optimizer_equals_the_plain_one(results: Results) -> None:
    plain, distributed = results[DP2], results[DISTRIBUTED_OPTIMIZER]
    assert distributed.losses == pytest.approx(plain.losses, rel=1e-5)
    assert distributed.assignments == plain.assignments
    assert distributed.thresholds == plain.thresholds


@pytest.mark.parametrize("layout", matrix(SAME_WEIGHTS, QUICK))
def test_the_same_weights_route_alike_under_every_layout(results: Results, layout: Case) -> None:
    one, many = results[LOADED], results[layout]
    assert_same_training(one, many)
    assert_same_gradients(one, many)


@pytest.mark.parametrize("layout", matrix(NULLS_MANY, ("nulls_pp2_ep2_recomputed",)))
def test_copied_tokens_and_their_gradients_are_alike_under_every_layout(
    results: Results, layout: Case
) -> None:
    one, many = results[NULLS_ONE], results[layout]
    assert_same_training(one, many)
    assert_same_gradients(one, many)
    assert len({*many.thresholds}) == len(many.thresholds)  # the bias moves
    for batch in many.finalized:  # on average near half of the slots are null
        assert 1.5 < sum(map(sum, batch["assignments"])) / sum(batch["tokens"]) < 2.6


def test_a_stage_without_experts_takes_part(results: Results) -> None:
    one, pipelined = results[LOADED_TWO], results[LOADED_TWO_PP2]
    assert_same_training(one, pipelined)
    assert_same_gradients(one, pipelined)
    assert pipelined.ranks[1]["steps"][-1]["threshold"] == {}
    assert set(pipelined.ranks[0]["steps"][-1]["threshold"]) == {"1", "2"}


def test_shared_experts_may_overlap(results: Results) -> None:
    plain, overlapped = results[SHARED_EXPERTS], results[SHARED_OVERLAP]
    assert overlapped.losses == pytest.approx(plain.losses, rel=1e-6)
    assert overlapped.assignments == plain.assignments


def test_no_token_uses_more_experts_than_the_cap(results: Results) -> None:
    for batch in results[CAP].finalized:
        assignments = sum(sum(layer) for layer in batch["assignments"])
        tokens, squares = sum(batch["tokens"]), sum(batch["squared_experts"])
        # With n1 tokens of 1 expert and n2 of 2: n1 + n2, n1 + 2 n2 and n1 + 4 n2.
        assert squares == 3 * assignments - 2 * tokens
        assert sum(batch["tokens_at_cap"]) == assignments - tokens > 0


def test_fixed_routings_keep_their_numbers(results: Results) -> None:
    assert results[TOP_P].thresholds == [pytest.approx(0.3, abs=1e-7)] * 3
    assert results[TOP_K].finalized == []  # stock top-k has no part of ours
