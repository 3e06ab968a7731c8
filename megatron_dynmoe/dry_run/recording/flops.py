"""FLOPs of operations: PyTorch's own formulas, and those that it lacks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula


@register_flop_formula([torch.ops.aten._grouped_mm])
def _grouped_gemm(left_shape: Any, right_shape: Any, *_: Any, **__: Any) -> int:
    """Rows times their expert's weight, [R, I] [E, I, O], or rows times rows, [O, R] [R, I]."""
    return 2 * left_shape[-2] * left_shape[-1] * right_shape[-1]


def formula_of(operation: Any) -> Callable[..., int] | None:
    """The formula of an operation, which takes its arguments and its result as ``out_val``."""
    packet = operation._overloadpacket
    formula = flop_registry.get(packet)
    if formula is not None and packet in _ATTENTION:
        return functools.partial(_with_all_heads, formula, _ATTENTION[packet])
    return formula


_aten = torch.ops.aten
# Where the queries stand among the arguments; keys and values follow.
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention: 0,
    _aten._scaled_dot_product_flash_attention_backward: 1,
}


def _with_all_heads(formula: Callable[..., int], at: int, *args: Any, **kwargs: Any) -> int:
    """PyTorch's formula, which wants as many heads of keys as of queries."""
    query, *groups = args[at : at + 3]
    keys = [part[:, :1].expand(-1, query.shape[1], -1, -1) for part in groups]
    return formula(*args[: at + 1], *keys, *args[at + 3 :], **kwargs)
