"""Choosing experts in fewer and quicker operations on a CPU, in inference.

Experts are those of :mod:`megatron_dynmoe.routing.select`, which decides on any other device and in
training, and everywhere with ``DYNMOE_KERNELS=0``. Exports ship with this file and with that one.
"""

from __future__ import annotations

import os
import struct
from functools import lru_cache

import torch
from torch import Tensor

from megatron_dynmoe.routing.select import (
    FIXED_POINT_BITS,
    NEVER_EXCEEDED,
    most_experts,
    threshold_in_units,
    used_in_order,
)
from megatron_dynmoe.routing.select import choose as choose_anywhere
from megatron_dynmoe.routing.select import choose_top_k as choose_top_k_anywhere


def choose(
    probs_TE: Tensor, threshold: Tensor | float, max_experts: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`megatron_dynmoe.routing.select.choose`, quickly if values may decide how."""
    if not (_values_may_decide(probs_TE) and probs_TE.dtype == torch.float32):
        return choose_anywhere(probs_TE, threshold, max_experts)
    most = most_experts(probs_TE.shape[-1], max_experts)
    is_number = isinstance(threshold, float)
    if is_number and probs_TE.shape[0] == 1:
        return _choose_for_one(probs_TE, number_in_units(threshold), most)
    ranked = _sort_quickly(probs_TE)
    if ranked is None:
        return choose_anywhere(probs_TE, threshold, max_experts)
    limit = number_in_units(threshold) if is_number else threshold_in_units(threshold, probs_TE)
    sorted_TE, order_TE = ranked
    return order_TE[:, :most], used_in_order(sorted_TE, limit, most)


def choose_top_k(probs_TE: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """:func:`megatron_dynmoe.routing.select.choose_top_k`, quickly if values may decide how."""
    ranked = _sort_quickly(probs_TE) if _values_may_decide(probs_TE) else None
    if ranked is None:
        return choose_top_k_anywhere(probs_TE, num_experts)
    ids_TK = ranked[1][:, :num_experts]
    return ids_TK, torch.ones_like(ids_TK, dtype=torch.bool)


def _values_may_decide(values: Tensor) -> bool:
    """Whether values may decide what is computed.

    A GPU would wait, a graph cannot branch, a fake tensor, which is on the CPU by its own word, has
    none, and a training on a CPU stands in for one on a GPU. ``DYNMOE_KERNELS=0`` asks for plain
    PyTorch.
    """
    # Exports ship without ``kernels.asked_for``.
    if torch.compiler.is_compiling() or os.environ.get("DYNMOE_KERNELS") == "0":
        return False
    return type(values) is Tensor and values.device.type == "cpu" and not values.requires_grad


def _sort_quickly(probs_TE: Tensor) -> tuple[Tensor, Tensor] | None:
    """Sort in about a third of the time of a stable sort; None if a token has a tie, or NaN."""
    sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True)
    falls = (sorted_TE[:, 1:] < sorted_TE[:, :-1]).all()
    return (sorted_TE, order_TE) if falls else None


def _choose_for_one(probs_TE: Tensor, limit: int, most: int) -> tuple[Tensor, Tensor]:
    """Choose for one token in plain numbers: to launch a tensor's operations takes longer.

    Units are exact in Python, too: a double times a power of two, and whole numbers of any size.
    """
    (probs,) = probs_TE.tolist()
    if any(prob != prob for prob in probs):
        probs, limit = [0.0] * len(probs), -1
    order = sorted(range(len(probs)), key=probs.__getitem__, reverse=True)[:most]  # stable
    total, number = 0, 0
    while number < most and (number == 0 or total <= limit):
        total += int(probs[order[number]] * 2**FIXED_POINT_BITS)
        number += 1
    used = [True] * number + [False] * (most - number)
    return torch.tensor([order]), torch.tensor([used])


@lru_cache(maxsize=1024)
def number_in_units(threshold: float) -> int:
    """The threshold in units, as a float32; see :func:`select.threshold_in_units`."""
    if threshold != threshold:
        return -(2**FIXED_POINT_BITS)
    (rounded,) = struct.unpack("f", struct.pack("f", min(max(threshold, -1.0), 1.0)))
    return NEVER_EXCEEDED if rounded == 1 else int(rounded * 2**FIXED_POINT_BITS)
