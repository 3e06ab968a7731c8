"""FLOPs of operations: PyTorch's own formulas, and those that it lacks."""

from __future__ import annotations

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
    return flop_registry.get(operation._overloadpacket)
