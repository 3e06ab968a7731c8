"""Makes the launch of a Triton kernel an operator of PyTorch, in ``torch.ops.dynmoe``.

What runs without values then passes it by: fake tensors, ``torch.compile``, ``torch.export``. And
what watches operators, as profilers do, sees one of that name. An operator costs four microseconds;
``torch.library.custom_op`` makes the same, with more checks, for eighty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("dynmoe", "FRAGMENT")


def operator(*written: str) -> Callable[[Callable[..., None]], Any]:
    """Make a function that launches a kernel an operator of its name.

    Gradients do not pass: it belongs into an autograd function.

    Args:
        written: the tensors among its arguments that the kernel writes. It returns nothing, and
            every argument has a type: a tensor, a number, or either with ``None``.
    """

    def make(launch: Callable[..., None]) -> Any:
        name = launch.__name__
        _library.define(name + torch.library.infer_schema(launch, mutates_args=written))
        _library.impl(name, launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dynmoe::{name}", _launch_nothing, lib=_library)
        return getattr(torch.ops.dynmoe, name)

    return make


def _launch_nothing(*args: object) -> None:
    pass
