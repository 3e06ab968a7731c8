"""Triton kernels, one family a file; each has plain PyTorch behind the same function elsewhere."""

import functools
import importlib.util
import os

import torch


def available(device: torch.device) -> bool:
    """Whether kernels are used for tensors on ``device``: on CUDA, where Triton is installed.

    Only with ``DYNMOE_KERNELS=1`` in the environment: they were tried in Triton's interpreter, not
    on a GPU.
    """
    return device.type == "cuda" and _has_triton() and os.environ.get("DYNMOE_KERNELS") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
