"""``pytorch/ops/``: operations that Megatron uses alone. The operation fuser is left out.

Without ``GroupedLinear`` and ``ScaledSwiGLU`` Megatron says that the fuser is not supported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..not_stood_for import refuse
from .module.norms import LayerNorm, RMSNorm


class SwiGLU(torch.nn.Module):
    """``basic/swiglu.py``: the first half of the last dimension gates the second."""

    def __init__(self, **unused: Any) -> None:
        super().__init__()
        refuse(**unused)

    def forward(self, inp: Tensor) -> Tensor:
        """In float32, rounded to the input's type once."""
        gate, up = inp.float().chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up).to(inp.dtype)


__all__ = ["LayerNorm", "RMSNorm", "SwiGLU"]
