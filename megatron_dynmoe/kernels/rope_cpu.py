"""On a CPU: rotary position embedding (RoPE) with Megatron's own bits, in fewer calls.

Upstream negates, concatenates, and appends what does not rotate even if that is nothing; autograd
then goes through every part of the formula again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotates_all(values: Tensor, angles: Tensor) -> bool:
    """Whether :func:`rotate_halves` can rotate these values by these angles."""
    has_form = values.dim() == angles.dim() and values.shape[-1] == angles.shape[-1]
    return values.device.type == "cpu" and has_form


def rotate_halves(values: Tensor, angles: Tensor, scale: float = 1.0) -> Tensor:
    """Rotate pairs of elements (i, i + D / 2): ``(x cos a - y sin a, y cos b + x sin b)``.

    Args:
        values: [S, B, H, D], any floating dtype.
        angles: [S, 1 or B, 1, D] float32: a for the first element of a pair, b for the second.
        scale: multiplies cosines and sines, before they are rounded to the values' dtype.

    Returns:
        [S, B, H, D], dtype of the values. Not differentiable in the angles.
    """
    return _RotateHalves.apply(values, angles, scale)


class _RotateHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, angles: Tensor, scale: float) -> Tensor:
        cos, sin = (wave.mul_(scale).to(values.dtype) for wave in (angles.cos(), angles.sin()))
        half = values.shape[-1] // 2
        sin[..., :half].neg_()  # so y stands where x did, and its sign is in the sine
        ctx.save_for_backward(cos, sin)
        return values.roll(half, -1).mul_(sin).add_(values * cos)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rotated: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = d_rotated.shape[-1] // 2
        return (d_rotated * sin).roll(half, -1).add_(d_rotated * cos), None, None
