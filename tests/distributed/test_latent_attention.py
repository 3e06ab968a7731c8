"""Latent attention on torch_native through Megatron's loop.

It is compared with upstream's unfused attention in the same model, with other layouts, and with a
run that never stopped. Queries and keys have 12 numbers a head, values 6.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.distributed.agreement import GRADIENTS, assert_same_gradients, assert_same_training
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

LATENT = (
    f"{TINY} {DTOP_P} --moe-token-dispatcher-type alltoall --multi-latent-attention "
    "--q-lora-rank 16 --kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6 "
    "--kv-channels 6 --qk-layernorm --make-vocab-size-divisible-by 16 "
    "--moe-shared-expert-intermediate-size 32"
)
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full "
TP2 += "--recompute-method uniform --recompute-num-layers 1"
CP2 = "--context-parallel-size 2 --cp-comm-type a2a"
TO_SAVE = "--train-iters 2 --save-interval 1 --lr-decay-iters 2"
LOADED = "--load {dir}/latent_whole --finetune --no-load-optim --no-load-rng"


@contextlib.contextmanager
def unfused(recorder: Any) -> Iterator[None]:
    """Upstream's attention, which computes heads of two sizes once it has been built."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_dynmoe.backends.torch_native import TorchNativeSpecProvider
    from tests.distributed.faults import replaced

    class Unfused(DotProductAttention):
        def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 6, **kwargs: Any):
            super().__init__(*args, **kwargs)
            assert self.hidden_size_per_attention_head == v_channels  # by --kv-channels

    with replaced(TorchNativeSpecProvider, "core_attention", lambda provider: Unfused):
        yield


def case(name: str, num_ranks: int, flags: str, hooks: tuple = GRADIENTS, **fields: Any) -> Case:
    return add(Case(f"latent_{name}", num_ranks, f"{LATENT} {flags}", hooks=hooks, **fields))


WHOLE = case("whole", 1, f"{TO_SAVE} --save {{dir}}/latent_whole", hooks=())
RESUMED = case(
    "resumed",
    1,
    f"{TO_SAVE} --load {{dir}}/latent_whole --ckpt-step 1",
    hooks=(),
    after=(WHOLE,),
)
ONE = case("one", 1, LOADED, after=(WHOLE,))
UNFUSED = case("unfused", 1, LOADED, (f"{__name__}:unfused", *GRADIENTS), after=(WHOLE,))
LAYOUTS = [
    pytest.param(case("tp2", 2, f"{TP2} {LOADED}", after=(WHOLE,)), id="tp2"),
    pytest.param(
        case("cp2_ep2", 2, f"{CP2} --expert-model-parallel-size 2 {LOADED}", after=(WHOLE,)),
        id="cp2_ep2",
        marks=pytest.mark.long,
    ),
]


def test_it_trains_as_with_upstreams_unfused_attention(results: Results) -> None:
    assert_same_training(results[UNFUSED], results[ONE])
    assert_same_gradients(results[UNFUSED], results[ONE])


@pytest.mark.parametrize("split", LAYOUTS)
def test_every_layout_trains_it_alike(results: Results, split: Case) -> None:
    assert_same_training(results[ONE], results[split])
    assert_same_gradients(results[ONE], results[split])


def test_it_resumes_bitwise(results: Results) -> None:
    whole, resumed = results[WHOLE], results[RESUMED]
    assert resumed.losses == whole.losses[1:]
    assert resumed.thresholds == whole.thresholds[1:]
