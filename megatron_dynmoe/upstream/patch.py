"""A patch: functions of Megatron, ours in their place, the reason, and when it can go."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# What each function or class was before its first patch, by full name.
_replaced: dict[str, Any] = {}
_applied: set[str] = set()  # names of patches


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Patch:
    """One change to Megatron, or to PyTorch for Megatron's sake.

    Attributes:
        name: what it does, in a few words.
        reason: what upstream does, in which file, and why that does not work here.
        ends: the change of upstream after which the patch can go. A test notices it.
        wraps: full names, ``module:function`` or ``module:Class.method``. Each has a function that
            takes what is there and returns what replaces it.
        applies: whether this process needs the patch.
    """

    name: str
    reason: str
    ends: str
    wraps: Mapping[str, Callable[[Any], Any]]
    applies: Callable[[], bool] = _always

    def apply(self) -> None:
        """Replace the functions, in the order of ``wraps``, once and if this process needs it."""
        if self.name in _applied or not self.applies():
            return
        _applied.add(self.name)
        for full_name, wrap in self.wraps.items():
            owner, name = _find(full_name)
            found = getattr(owner, name)
            _replaced.setdefault(full_name, found)
            setattr(owner, name, wrap(found))


def upstreams(full_name: str) -> Any:
    """Look up a function or class as it was before any patch."""
    owner, name = _find(full_name)
    return _replaced.get(full_name, getattr(owner, name))


def _find(full_name: str) -> tuple[Any, str]:
    """Import what holds a function, and give the function's name there."""
    module, _, path = full_name.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name
