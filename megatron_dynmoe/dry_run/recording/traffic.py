"""Bytes that a kernel reads and writes in the device's memory, from its operands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_dynmoe.dry_run.devices import known

_aten = torch.ops.aten
OURS = "dynmoe"  # kernels/operators.py
# These only write what they change.
_OVERWRITE = (_aten.copy_.default, _aten.fill_.Scalar, _aten.zero_.default)
# These read as much of their first operand as they return, at places that another one names.
_GATHER = (
    _aten.embedding.default,
    _aten.gather.default,
    _aten.index.Tensor,
    _aten.index_select.default,
)


def bytes_of(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """What an operation reads and writes, each tensor once.

    That is the least: an operation that needs a value twice, and does not find it in a cache, reads
    it again. What an operator of ours takes as the indices of rows, it gathers while it computes.
    """
    values = _on_device((args, kwargs))
    results = _on_device(result)
    read = sum(map(size_of, values))
    if values and function in _OVERWRITE:
        read -= size_of(values[0])
    elif values and results and function in _GATHER:
        read += min(0, size_of(results[0]) - size_of(values[0]))
    if results:
        return read + sum(map(size_of, results))
    given = dict(zip((each.name for each in function._schema.arguments), args, strict=False))
    given |= kwargs
    if function.namespace == OURS and not given.get("adds"):
        return read  # which has what it only writes
    return read + sum(map(size_of, _changed(function, given)))


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's values; those that ``expand`` repeats count once."""
    numbers = [
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride
    ] or [min(1, tensor.numel())]
    return torch.Size(numbers).numel() * tensor.itemsize


def _changed(function: Any, given: dict[str, Any]) -> list[Tensor]:
    """The operands that an operation changes."""
    arguments = function._schema.arguments
    changed = [each for each in arguments if each.alias_info and each.alias_info.is_write]
    return _on_device([given.get(each.name) for each in changed])


class WithinKernel:
    """What the operations that make up one kernel read from outside of it.

    Attributes:
        num_bytes: of the tensors that it has read so far.
    """

    def __init__(self) -> None:
        self._made: set[int] = set()
        self._read: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        return sum(self._read.values())

    def add(self, inputs: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Add an operation."""
        for tensor in inputs:
            key = tensor.untyped_storage()._cdata
            if known.is_on_device(tensor) and key not in self._made:
                self._read[key] = max(self._read.get(key, 0), size_of(tensor))
        for tensor in results:
            key = tensor.untyped_storage()._cdata
            if key not in self._read:
                self._made.add(key)


def _on_device(values: Any) -> list[Tensor]:
    return [
        value
        for value in tree_leaves(values)
        if isinstance(value, Tensor) and known.is_on_device(value)
    ]
