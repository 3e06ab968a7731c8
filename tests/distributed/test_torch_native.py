"""The torch_native back end through Megatron's loop: like local, and under tensor parallelism.

Dropout is off, so runs that should agree do so up to the order in which floats are summed.
"""

import math

import pytest

from tests.distributed.agreement import GRADIENTS, assert_same_gradients
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add
from tests.distributed.selection import matrix

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

ALLTOALL = "--moe-token-dispatcher-type alltoall"
ALLGATHER = "--moe-token-dispatcher-type allgather"
LOCAL = "--moe-dynamic-backend local"
NATIVE = "--moe-dynamic-backend torch_native"
BACKENDS = {"local": LOCAL, "native": NATIVE}
TOP_P = "--moe-dynamic-routing top_p --moe-dynamic-threshold 0.3"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EP2 = "--expert-model-parallel-size 2"
# Megatron pads the vocabulary to a multiple of this times the tensor-parallel size.
VOCAB = "--make-vocab-size-divisible-by 16"
PP2 = "--pipeline-model-parallel-size 2"
GQA = "--group-query-attention --num-query-groups 2 --qk-layernorm"


def case(name: str, num_ranks: int, flags: str, **fields) -> Case:
    return add(Case(f"native_{name}", num_ranks, f"{TINY} {flags}", **fields))


# The same seed gives the same weights.
SAME = {
    f"{name}_{kind}": case(
        f"same_{name}_{kind}",
        ranks,
        f"{flags} {backend}",
        hooks=() if name == "top_k" else GRADIENTS,
    )
    for name, ranks, flags in (
        ("dtop_p", 1, f"{DTOP_P} {ALLTOALL}"),
        ("ep2", 2, f"{DTOP_P} {ALLTOALL} {EP2} --moe-shared-expert-intermediate-size 32"),
        ("gqa", 1, f"{TOP_P} {ALLGATHER} {GQA}"),
        ("top_k", 1, f"--moe-router-topk 2 {ALLTOALL} --apply-query-key-layer-scaling"),
    )
    for kind, backend in BACKENDS.items()
}
BF16 = case("bf16", 2, f"{DTOP_P} {ALLTOALL} {EP2} {NATIVE} --bf16 --use-distributed-optimizer")
DROPOUT = case(
    "dropout",
    2,
    f"{DTOP_P} {ALLTOALL} {TP2} {NATIVE} --attention-dropout 0.1 --hidden-dropout 0.1",
)
STORED, *RECOMPUTED = (
    case(f"recompute_{name}", 1, f"{DTOP_P} {ALLTOALL} {NATIVE} --attention-dropout 0.1 {flags}")
    for name, flags in (
        ("none", ""),
        (
            "full",
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ),
        ("selective", "--recompute-granularity selective --recompute-modules core_attn moe"),
    )
)

# Weights that every layout can load.
SAVED = {
    routing: case(
        f"saved_{routing}",
        1,
        f"{flags} {NATIVE} {ALLTOALL} {VOCAB} --train-iters 1 --save {{dir}}/native_{routing} "
        "--save-interval 1",
    )
    for routing, flags in (("dtop_p", DTOP_P), ("top_p", TOP_P))
}


def loaded(name: str, num_ranks: int, routing: str, flags: str) -> Case:
    flags = f"{DTOP_P if routing == 'dtop_p' else TOP_P} {NATIVE} {VOCAB} {flags}"
    load = f"--load {{dir}}/native_{routing} --finetune --no-load-optim --no-load-rng"
    name, flags = f"loaded_{routing}_{name}", f"{flags} {load}"
    return case(name, num_ranks, flags, hooks=GRADIENTS, after=(SAVED[routing],))


ONE_RANK = {routing: loaded("one_rank", 1, routing, ALLTOALL) for routing in SAVED}
TENSOR_PARALLEL = [
    (routing, loaded(name, ranks, routing, flags))
    for routing, name, ranks, flags in (
        ("dtop_p", "tp2", 2, f"{TP2} {ALLTOALL}"),
        ("dtop_p", "tp2_allgather", 2, f"{TP2} {ALLGATHER}"),
        ("top_p", "tp2", 2, f"{TP2} {ALLTOALL}"),
        ("top_p", "tp2_allgather", 2, f"{TP2} {ALLGATHER}"),
        ("dtop_p", "tp2_ep2", 4, f"{TP2} {EP2} {ALLTOALL}"),
        ("top_p", "tp2_ep2_allgather", 4, f"{TP2} {EP2} {ALLGATHER}"),
        (
            "dtop_p",
            "tp2_whole_experts",
            2,
            f"{TP2} {EP2} {ALLTOALL} --expert-tensor-parallel-size 1",
        ),
        ("dtop_p", "tp2_pp2", 4, f"{TP2} {PP2} {ALLTOALL} --use-distributed-optimizer"),
    )
]

# Checkpoints: two steps under one back end, two more under the other, from the whole state.
RESHARDABLE = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
EXCHANGED = []
for layout, ranks, flags in (
    ("ep2", 2, EP2),
    ("ep2_distopt", 2, f"{EP2} {RESHARDABLE}"),
    ("pp2", 2, PP2),
    ("dp2_distopt", 2, RESHARDABLE),
):
    train = f"{DTOP_P} {ALLTOALL} {flags} --train-iters 4"
    for saver, loader in (("local", "native"), ("native", "local")):
        folder = f"{{dir}}/exchanged_{layout}_{saver}"
        first = case(
            f"saves_{layout}_{saver}",
            ranks,
            f"{train} {BACKENDS[saver]} --save {folder} --save-interval 2",
        )
        second = case(
            f"loads_{layout}_{loader}",
            ranks,
            f"{train} {BACKENDS[loader]} --load {folder} --ckpt-step 2",
            after=(first,),
        )
        EXCHANGED.append((first, second))


@pytest.mark.parametrize("name", ["dtop_p", "ep2", "gqa", "top_k"])
def test_trains_like_local(results: Results, name: str) -> None:
    local, native = results[SAME[f"{name}_local"]], results[SAME[f"{name}_native"]]
    assert native.losses == pytest.approx(local.losses, rel=1e-5)
    assert native.losses[-1] < native.losses[0] - 0.1
    assert "back end: torch_native (asked for)" in native.log(0)
    if name != "top_k":
        assert_same_gradients(local, native)
        assert native.assignments[0] == local.assignments[0]
        assert native.experts_per_token == pytest.approx(local.experts_per_token, abs=0.01)


@pytest.mark.parametrize("trained", [BF16, DROPOUT, STORED], ids=lambda case: case.name)
def test_trains_in_bf16_and_with_dropout(results: Results, trained: Case) -> None:
    losses = results[trained].losses
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("recomputed", RECOMPUTED, ids=lambda case: case.name)
def test_recompute_changes_nothing(results: Results, recomputed: Case) -> None:
    assert results[recomputed].losses == results[STORED].losses
    assert results[recomputed].finalized == results[STORED].finalized


@pytest.mark.parametrize(
    ("routing", "layout"),
    matrix(
        TENSOR_PARALLEL,
        (
            *("native_loaded_dtop_p_tp2", "native_loaded_top_p_tp2_allgather"),
            "native_loaded_dtop_p_tp2_whole_experts",
        ),
    ),
)
def test_tensor_parallel_equals_one_rank(results: Results, routing: str, layout: Case) -> None:
    one, many = results[ONE_RANK[routing]], results[layout]
    assert many.losses == pytest.approx(one.losses, rel=1e-5)
    if "--use-distributed-optimizer" not in layout.flags:  # each rank has its part only
        assert_same_gradients(one, many)
    assert [step["grad_norm"] for step in many.ranks[-1]["steps"]] == pytest.approx(
        [step["grad_norm"] for step in one.ranks[-1]["steps"]], rel=1e-3
    )
    # Fails, as that of theta, where two ranks hold different values.
    assert many.thresholds == pytest.approx(one.thresholds, abs=1e-4)
    for ours, theirs in zip(many.by_layer("theta"), one.by_layer("theta"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    # The counts of both ranks of a tensor-parallel group are one and the same batch.
    assert many.experts_per_token == pytest.approx(one.experts_per_token, abs=0.01)
    for name in ("balance_loss", "dynamic_loss"):
        if name in one.finalized[0]:
            ours = [batch[name] for batch in many.finalized]
            theirs = [batch[name] for batch in one.finalized]
            for step, reference in zip(ours, theirs, strict=True):
                assert step == pytest.approx(reference, rel=1e-3)


@pytest.mark.parametrize(
    ("first", "second"),
    matrix(
        EXCHANGED,
        ("native_loads_ep2_distopt_native",),
    ),
)
def test_either_back_end_goes_on_from_the_others_checkpoint(
    results: Results, first: Case, second: Case
) -> None:
    whole, resumed = results[first], results[second]
    assert len(whole.losses) == 4
    # The fourth loss follows from the third step, so from the optimizer's state.
    assert resumed.losses == pytest.approx(whole.losses[2:], rel=1e-5)
    assert resumed.thresholds == pytest.approx(whole.thresholds[2:], abs=1e-4)
