"""Fast implementations of functions of ``routing/`` and ``moe/``, each for one kind of device.

Tests hold each one equal to the plain PyTorch that it replaces. The environment variable
``DYNMOE_KERNELS`` chooses:

    0      plain PyTorch everywhere
    unset  on a CPU ``routing_cpu``, ``cross_entropy_cpu`` and PyTorch's fused AdamW in training
           and ``choose_cpu`` in inference, plain PyTorch on CUDA
    1      as unset, but the Triton kernels on CUDA if Triton is installed. They have run in
           Triton's interpreter, but not on a GPU yet
    fused  as 1, and the experts are fused also where PyTorch has a grouped GEMM of its own, as it
           has for bf16 from Hopper on
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dynmoe.routing.route import Routing, route
from megatron_dynmoe.settings.messages.command_line import UsageError

SETTINGS = ("0", "1", "fused")  # of DYNMOE_KERNELS


def choose_route(logits_TE: Tensor) -> Callable[..., Routing]:
    """Choose the fastest :func:`megatron_dynmoe.routing.route.route` for these logits.

    Raises:
        UsageError: ``DYNMOE_KERNELS`` is set to something else.
    """
    if is_plain_cpu(logits_TE) and asked_for() != "0":
        from megatron_dynmoe.kernels.routing_cpu import route_in_blocks

        return route_in_blocks
    # The kernel computes in float32, and its grid would be empty if there were no tokens.
    if logits_TE.dtype != torch.float64 and logits_TE.numel() and available(logits_TE.device):
        from megatron_dynmoe.kernels.routing_triton import route_fused

        return route_fused
    return route


def available(device: torch.device) -> bool:
    """Whether Triton's kernels are used for tensors on ``device``."""
    return device.type == "cuda" and asked_for() in ("1", "fused") and _has_triton()


def asked_for() -> str | None:
    """What ``DYNMOE_KERNELS`` says.

    Raises:
        UsageError: it is something else than 0, 1 or fused.
    """
    setting = os.environ.get("DYNMOE_KERNELS") or None
    if setting not in (*SETTINGS, None):
        raise UsageError(
            f"DYNMOE_KERNELS is {setting!r}: set 0 for plain PyTorch, 1 for Triton's kernels on a "
            "GPU, fused for these and fused experts also on Hopper, or unset it."
        )
    return setting


def is_plain_cpu(values: Tensor) -> bool:
    """Whether NumPy can read the values. It cannot in a compiled function or from a fake tensor."""
    return values.is_cpu and type(values) is Tensor and not torch.compiler.is_compiling()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
