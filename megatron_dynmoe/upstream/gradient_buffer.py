"""Where the gradients of parameters begin in Megatron's buffer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron.core.optimizer.param_layout import pad_param_start

if TYPE_CHECKING:
    from megatron.core.optimizer.param_layout import PerBufferParamLayout


def aligned(layout_of: Callable[..., PerBufferParamLayout]) -> Callable[..., PerBufferParamLayout]:
    """Let each gradient begin at a multiple of 64 elements, as with the distributed optimizer.

    Without it they follow each other without a gap, and the one element of a router's
    ``theta_offset`` moves all after it away from the addresses that processors read fastest. The
    gaps stay zero and count as elements of their buckets.
    """

    @functools.wraps(layout_of)
    def layout(*args: Any, **kwargs: Any) -> PerBufferParamLayout:
        found = layout_of(*args, **kwargs)
        places: dict[Any, tuple[int, int, int]] = {}
        buckets: list[tuple[int, int]] = []
        position = 0
        for parameter, (start, end, bucket) in found.param_index_map.items():
            if bucket == len(buckets):
                buckets.append((position, position))
            places[parameter] = position, position + end - start, bucket
            position = pad_param_start(position + end - start)
            buckets[bucket] = buckets[bucket][0], position
        return dataclasses.replace(
            found,
            param_index_map=places,
            bucket_indices=buckets,
            per_bucket_numel_unpadded=[end - start for start, end in buckets],
        )

    return layout
