"""Triton kernels, one family a file; each has plain PyTorch behind the same function elsewhere."""

import functools
import importlib.util
import os

import torch


def available(device: torch.device) -> bool:
    """Whether kernels are used for tensors on ``device``: on CUDA, where Triton is installed.

    ``DYNMOE_KERNELS=0`` in the environment turns them off.
    """
    return device.type == "cuda" and _has_triton() and os.environ.get("DYNMOE_KERNELS") != "0"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
