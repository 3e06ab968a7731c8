"""A CPU in the place of a GPU: it takes a GPU's ways through the code, and kernels are interpreted.

A test that runs nowhere before there is a GPU is itself untested. Values computed here say nothing
about a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.kernels.device import DEVICE

ON_GPU = DEVICE == "cuda"


def take_the_ways_of_cuda(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Choose implementations for this CPU's tensors as on a Hopper GPU.

    Args:
        replace: ``setattr``, or a ``monkeypatch.setattr`` that takes it back.
    """
    from megatron_dynmoe import kernels
    from megatron_dynmoe.backends import choice
    from megatron_dynmoe.moe import fused, grouped_linear, permute

    of_this_device = grouped_linear.uses_grouped_mm

    def uses_grouped_mm(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
        return dtype == torch.bfloat16 and of_this_device(device, dtype, *sizes)

    replace(kernels, "available", lambda device: kernels.asked_for() in ("1", "fused"))
    replace(kernels, "is_plain_cpu", lambda values: False)
    replace(permute, "scatters_in_order", lambda device: False)
    for module in (fused, grouped_linear, choice):
        replace(module, "uses_grouped_mm", uses_grouped_mm)
