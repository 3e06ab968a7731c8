"""Gradients begin at aligned addresses, and lie in the buckets that upstream gives them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.megatron


@pytest.mark.hypothesis
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 2, 63, 64, 65, 128, 1000]), min_size=1, max_size=12),
    bucket_size=st.sampled_from([None, 1, 64, 200, 5000]),
)
def test_places_do_not_overlap_and_buckets_stay(sizes: list[int], bucket_size: int | None) -> None:
    from megatron.core.distributed import param_and_grad_buffer

    from megatron_dynmoe.upstream.gradient_buffer import aligned

    theirs = param_and_grad_buffer._compute_default_per_buffer_param_layout
    theirs = getattr(theirs, "__wrapped__", theirs)
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    before, after = theirs(parameters, bucket_size), aligned(theirs)(parameters, bucket_size)
    assert list(after.param_index_map) == list(before.param_index_map)
    position = 0
    for parameter, (start, end, bucket) in after.param_index_map.items():
        assert start == position and start % 64 == 0 and end - start == parameter.numel()
        assert bucket == before.param_index_map[parameter][2]
        first, last = after.bucket_indices[bucket]
        assert first <= start and end <= last
        position = start + -(-parameter.numel() // 64) * 64
    ends = [0, *(end for _, end in after.bucket_indices)]
    assert [start for start, _ in after.bucket_indices] == ends[:-1] and ends[-1] == position
    assert sum(after.per_bucket_numel_unpadded) == position  # what upstream asserts


def test_gradients_of_a_layer_begin_at_cache_lines() -> None:
    """Megatron's own buffer, in which the router's theta_offset has one element."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_dynmoe.settings.config import DynMoEConfig
    from tests.moe import one_rank

    one_rank.world_of_one()
    layer = one_rank.moe_layer(DynMoEConfig(routing="top_p", threshold=0.4, normalization="drn"))
    assert 1 in {parameter.numel() for parameter in layer.parameters()}
    DistributedDataParallel(layer.config, DistributedDataParallelConfig(), layer)
    addresses = {name: p.main_grad.data_ptr() % 64 for name, p in layer.named_parameters()}
    assert set(addresses.values()) == {0}, addresses
