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

SIZES = (
    "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 12 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 4 --v-head-dim 6 --kv-channels 6 --qk-layernorm "
    "--moe-shared-expert-intermediate-size 32"
)
LATENT = f"{TINY} {DTOP_P} {SIZES} --moe-token-dispatcher-type alltoall"
LATENT += " --make-vocab-size-divisible-by 16"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full "
TP2 += "--recompute-method uniform --recompute-num-layers 1"
TO_SAVE = "--train-iters 2 --save-interval 1 --lr-decay-iters 2"


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
    return Case(f"latent_{name}", num_ranks, f"{LATENT} {flags}", hooks=hooks, **fields)


WHOLE = add(case("whole", 1, f"{TO_SAVE} --save {{dir}}/latent_whole", hooks=()))


def loaded(name: str, num_ranks: int, flags: str = "", hooks: tuple = GRADIENTS) -> Case:
    flags += " --load {dir}/latent_whole --finetune --no-load-optim --no-load-rng"
    return case(name, num_ranks, flags, hooks, after=(WHOLE,))


RESUMED = add(
    case(
        "resumed",
        1,
        f"{TO_SAVE} --load {{dir}}/latent_whole --ckpt-step 1",
        hooks=(),
        after=(WHOLE,),
    )
)
ONE = add(loaded("one", 1))
UNFUSED = add(loaded("unfused", 1, hooks=(f"{__name__}:unfused", *GRADIENTS)))
SPLIT = add(loaded("tp2", 2, TP2))


def test_it_trains_as_with_upstreams_unfused_attention(results: Results) -> None:
    assert_same_training(results[UNFUSED], results[ONE])
    assert_same_gradients(results[UNFUSED], results[ONE])


def test_tensor_parallel_ranks_train_it_as_one(results: Results) -> None:
    assert_same_training(results[ONE], results[SPLIT])
    assert_same_gradients(results[ONE], results[SPLIT])


def test_it_resumes_bitwise(results: Results) -> None:
    whole, resumed = results[WHOLE], results[RESUMED]
    assert resumed.losses == whole.losses[1:]
    assert resumed.thresholds == whole.thresholds[1:]
