"""The few values behind fake tensors that the host knows, and what it learns of the others.

A fake tensor has no values, but a training asks for some: numbers that it has itself sent to the
device, and counts of rows. These follow a tensor through copies and views. Every other value is
made up: it lets the step take the way that costs most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

LARGEST = 4096  # elements of a tensor whose values are remembered
# More than any --clip-grad, so that a gradient's norm leads to clipping.
UNKNOWN_FLOAT = 1e4

_aten = torch.ops.aten
_COPIES_AND_VIEWS = {
    _aten._to_copy.default,
    _aten._unsafe_view.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten.detach.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.view.default,
}
_RANGES = {_aten.arange.default, _aten.arange.start, _aten.arange.start_step}


def know(tensor: Any, value: Any) -> None:
    """Remember the values of a fake tensor; anything else is ignored.

    Args:
        value: a tensor of the same shape, or anything that makes one.
    """
    if isinstance(tensor, FakeTensor) and tensor.numel() <= LARGEST:
        with _disable_current_modes():
            tensor._dry_run_value = torch.as_tensor(value).reshape(tensor.shape).contiguous()  # type: ignore[attr-defined]


def is_on_device(tensor: Tensor) -> bool:
    """Whether a tensor is on the device, without asking by way of an operation."""
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return device.type == "cuda"


def value_of(tensor: Tensor) -> Tensor | None:
    """The known values of a tensor, on the CPU."""
    return getattr(tensor, "_dry_run_value", None)


def number_in(tensor: Tensor) -> bool | int | float:
    """What the host reads from a tensor of one element."""
    value = value_of(tensor)
    if value is not None:
        with _disable_current_modes():
            return value.item()
    if tensor.dtype == torch.bool:
        return False
    return UNKNOWN_FLOAT if tensor.dtype.is_floating_point else 0


def split(total: int, parts: int) -> Any:
    """Split a number into whole parts that differ by at most one, [parts] int64."""
    return total // max(parts, 1) + (np.arange(parts) < total % max(parts, 1))


def follow(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Remember the values of an operation's result, if those of its input are known.

    On the host any operation passes them on, on the device copies and views only. An operation in
    place changes its first argument, whose values are forgotten.
    """
    if function._schema.is_mutable:
        for changed in args[0] if isinstance(args[0], list) else args[:1]:
            if value_of(changed) is not None:
                del changed._dry_run_value
    if not isinstance(result, Tensor):
        return
    if function is _aten.lift_fresh.default:
        if type(args[0]) is Tensor:  # made from Python's numbers
            know(result, args[0])
    elif function is _aten.fill_.Scalar:
        with _disable_current_modes():
            know(result, torch.full(result.shape, args[1]))
    elif function in _RANGES:
        with _disable_current_modes():
            know(result, function(*args, dtype=kwargs.get("dtype")))
    elif function in _COPIES_AND_VIEWS:
        value = value_of(args[0])
        if value is not None:
            with _disable_current_modes():
                copied = value if function is _aten._to_copy.default else function(value, *args[1:])
            know(result, copied)
    elif not is_on_device(result):
        values, structure = tree_flatten(args)
        tensors = [each for each in values if isinstance(each, Tensor)]
        if tensors and all(value_of(each) is not None for each in tensors):
            real = [value_of(each) if isinstance(each, Tensor) else each for each in values]
            with _disable_current_modes():
                know(result, function(*tree_unflatten(real, structure), **kwargs))
