"""Settings that must not change what is learned: how a batch is cut, stored, sent and computed.

All runs start with the same weights and, apart from what is named, have the same flags.
"""

import pytest

from tests.distributed.agreement import GRADIENTS, assert_same_gradients, assert_same_training
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron, pytest.mark.long]

SHARED = "--moe-shared-expert-intermediate-size 32"
NATIVE = "--moe-dynamic-backend torch_native"
ALLGATHER = "--moe-token-dispatcher-type allgather"
DENSE_FIRST = '--moe-layer-freq "[0,1,1,1]"'
SELECTIVE = "--recompute-granularity selective --recompute-modules"
FULL = "--recompute-granularity full --recompute-method"


BASE = f"{TINY} {DTOP_P} --moe-token-dispatcher-type alltoall {SHARED} {DENSE_FIRST}"
# One seed gives other weights with another micro-batch size: upstream's warm-up draws first.
SAVE = "--save {dir}/invariance --save-interval 1 --train-iters 1"
LOAD = "--load {dir}/invariance --finetune --no-load-optim --no-load-rng"
SAVED = add(Case("invariance_saved", 1, f"{BASE} {SAVE}"))


def case(name: str, flags: str = "", num_ranks: int = 1) -> Case:
    flags = f"{BASE} {LOAD} {flags}"
    return add(Case(f"invariance_{name}", num_ranks, flags, hooks=GRADIENTS, after=(SAVED,)))


PLAIN, PLAIN_NATIVE = case("plain"), case("native", NATIVE)

# Other sums or other kernels: the same up to the order of float sums.
REORDERED = [
    PLAIN_NATIVE,
    case("micro_batch_1", "--micro-batch-size 1"),
    case("micro_batch_4", "--micro-batch-size 4"),
    case("micro_batch_8", "--micro-batch-size 8"),
    case("allgather", ALLGATHER),
    case("native_allgather", f"{NATIVE} {ALLGATHER} --micro-batch-size 8"),
]
# The same arithmetic once more: the same bits. Upstream's other kinds need Transformer Engine
# (layernorm) or belong to other attentions (mla_up_proj, gdn_norm_out).
RECOMPUTED = [
    (PLAIN, case(name, flags))
    for name, flags in (
        ("full_uniform", f"{FULL} uniform --recompute-num-layers 1"),
        ("full_uniform_2", f"{FULL} uniform --recompute-num-layers 2"),
        ("full_block", f"{FULL} block --recompute-num-layers 3"),
        ("attention", f"{SELECTIVE} core_attn"),
        ("dense_mlp", f"{SELECTIVE} mlp"),
        ("moe", f"{SELECTIVE} moe"),
        ("shared", f"{SELECTIVE} shared_experts"),
    )
]
RECOMPUTED += [
    (PLAIN_NATIVE, case("native_full_block", f"{NATIVE} {FULL} block --recompute-num-layers 3")),
    (PLAIN_NATIVE, case("native_moe_shared", f"{NATIVE} {SELECTIVE} moe shared_experts")),
    (PLAIN_NATIVE, case("native_activations", f"{NATIVE} {SELECTIVE} moe_act core_attn")),
]

GLOBAL = "--moe-dynamic-balance-loss global_aux_loss --moe-dynamic-balance-loss-coeff 1"
GLOBAL_ONE = case("global_one", f"{GLOBAL} --micro-batch-size 4")
GLOBAL_DP2 = case("global_dp2", f"{GLOBAL} --micro-batch-size 2", num_ranks=2)


@pytest.mark.parametrize("other", REORDERED, ids=lambda case: case.name)
def test_micro_batches_dispatchers_and_back_ends_train_alike(results: Results, other: Case) -> None:
    plain, found = results[PLAIN], results[other]
    assert_same_training(plain, found)
    assert_same_gradients(plain, found)
    for name in ("balance_loss", "dynamic_loss"):  # sums over micro-batches
        for ours, theirs in zip(found.finalized, plain.finalized, strict=True):
            per_micro_batch = [
                [
                    loss / max(count, 1)
                    for loss, count in zip(batch[name], batch["micro_batches"], strict=True)
                ]
                for batch in (ours, theirs)
            ]
            assert per_micro_batch[0] == pytest.approx(per_micro_batch[1], rel=1e-3)


@pytest.mark.parametrize(
    ("plain", "recomputed"), RECOMPUTED, ids=[other.name for _, other in RECOMPUTED]
)
def test_recomputation_changes_no_bit(results: Results, plain: Case, recomputed: Case) -> None:
    stored, found = results[plain], results[recomputed]
    assert found.losses == stored.losses
    assert found.finalized == stored.finalized
    for name in ("threshold", "integral", "theta"):
        assert found.by_layer(name) == stored.by_layer(name)
    assert_same_gradients(stored, found, tolerance=0)


def test_the_balance_loss_of_the_global_batch_spans_the_ranks(results: Results) -> None:
    """Two ranks of two sequences see the fractions that one rank sees with four."""
    one, dp2 = results[GLOBAL_ONE], results[GLOBAL_DP2]
    assert_same_training(one, dp2)
    assert_same_gradients(one, dp2)
