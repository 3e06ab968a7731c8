"""Work of Megatron's that the common case does not need.

Leaving it out changes no result: the part of a rotation that is empty, the sorting of rows that are
in order, and their journey to nobody else. The loss of a vocabulary that nobody else has a part of
is rounded in another place. On a CPU each of these takes a share of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.parallel_state import get_tensor_model_parallel_group
from torch import Tensor

from megatron_dynmoe import kernels
from megatron_dynmoe.kernels.cross_entropy_cpu import cross_entropy
from megatron_dynmoe.kernels.rope_cpu import rotate_halves, rotates_all


def rotating_halves(rotate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let upstream's rotation of queries or keys do the common case on a CPU in fewer calls."""

    @functools.wraps(rotate)
    def rotated(
        values: Tensor,
        angles: Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
        **other: Any,
    ) -> Tensor:
        is_plain = not (rotary_interleaved or mla_rotary_interleaved or other)
        if is_plain and rotates_all(values, angles):
            return rotate_halves(values, angles, mscale)
        return rotate(values, angles, rotary_interleaved, mla_rotary_interleaved, mscale, **other)

    return rotated


def with_whole_vocabularies(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let upstream's cross entropy have fewer passes on a CPU if a rank has all of a vocabulary.

    ``DYNMOE_KERNELS=0`` leaves it as it is.
    """

    @functools.wraps(loss)
    def of_tokens(
        logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, tp_group: Any = None
    ) -> Tensor:
        group = get_tensor_model_parallel_group() if tp_group is None else tp_group
        is_plain = group.size() == 1 and not label_smoothing and kernels.is_plain_cpu(logits)
        if is_plain and kernels.asked_for() != "0":
            return cross_entropy(logits, targets)
        return loss(logits, targets, label_smoothing, tp_group)

    return of_tokens


def sending(all_to_all: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Leave rows where they are if there is no other rank, without a function of autograd."""

    @functools.wraps(all_to_all)
    def sent(group: Any, rows: Tensor, *sizes: Any, **options: Any) -> Tensor:
        return rows if group.size() == 1 else all_to_all(group, rows, *sizes, **options)

    return sent


def sort_of_ranks(sort: Callable[..., Any]) -> Callable[..., Any]:
    """Leave rows as they are that come from a single rank, in the order of its experts already."""

    @functools.wraps(sort)
    def sorted_rows(
        rows: Tensor, sizes: Tensor, order: Tensor, probs: Tensor | None = None, fused: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        is_in_order = order.device.type == "cpu" and order.tolist() == [*range(len(order))]
        # Upstream's sizes may leave out rows, which its sort drops.
        if is_in_order and sizes.device.type == "cpu" and int(sizes.sum()) == len(rows):
            return rows, probs
        return sort(rows, sizes, order, probs=probs, fused=fused)

    return sorted_rows
