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


def formula_of(operation: Any) -> Callable[..., float] | None:
    """The formula of an operation, which takes its arguments and its result as ``out_val``."""
    formula = flop_registry.get(operation._overloadpacket)
    names = [argument.name for argument in operation._schema.arguments]
    if formula is None or "is_causal" not in names:
        return formula
    return functools.partial(_of_attention, formula, names.index("query"), names.index("is_causal"))


def _of_attention(
    formula: Callable[..., int], queries: int, causal: int, *args: Any, **kwargs: Any
) -> float:
    """PyTorch's formula, which wants as many heads of keys as of queries and knows no mask.

    Causal attention is half of it, as in Megatron's own formula.

    Args:
        queries: their place among the arguments; keys and values follow.
        causal: the place of ``is_causal``.
    """
    query, *groups = args[queries : queries + 3]
    keys = [part[:, :1].expand(-1, query.shape[1], -1, -1) for part in groups]
    whole = formula(*args[: queries + 1], *keys, *args[queries + 3 :], **kwargs)
    is_causal = args[causal] if len(args) > causal else kwargs.get("is_causal", False)
    return whole / 2 if is_causal else whole
