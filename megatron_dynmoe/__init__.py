"""Mixture-of-experts models whose tokens choose how many experts they use, on Megatron-Core.

Importing this package changes nothing and loads neither torch nor Megatron: upstream is touched
only when an entry point (``megatron_dynmoe.pretrain``, ``megatron_dynmoe.run``) or the layer
spec (``megatron_dynmoe.specs``) is used.

``Router``, ``Experts``, ``MoELayer`` with its ``Losses``, and ``Controller`` are the method in
plain PyTorch, for models that are no Megatron. They load torch when they are first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dynmoe.layers.controller import Controller
    from megatron_dynmoe.layers.moe import Experts, Losses, MoELayer
    from megatron_dynmoe.layers.router import Router

__all__ = ["Controller", "Experts", "Losses", "MoELayer", "Router"]

__version__ = "0.1.0"

_MODULES = {
    "Controller": "controller",
    "Experts": "moe",
    "Losses": "moe",
    "MoELayer": "moe",
    "Router": "router",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.layers.{_MODULES[name]}"), name)
