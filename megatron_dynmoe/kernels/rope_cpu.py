"""On a CPU: rotary position embedding (RoPE) with Megatron's own bits, in fewer calls.

Upstream negates, concatenates, and appends what does not rotate even if that is nothing; autograd
then goes through every part of the formula again. It computes the same cosines and sines for
queries and keys of every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

# By angles, which all layers share: cosines and sines, by what else they depend on.
_WAVES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
        [S, B, H, D], dtype of the values, in memory as [B, H, S, D], which attention reads faster.
        Not differentiable in the angles.
    """
    return _RotateHalves.apply(values, *_waves(angles, scale, values.dtype))


def _waves(angles: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with their signs, [1 or B, 1, S, D], kept as long as the angles are."""
    kept: dict[Any, tuple[Tensor, Tensor]] = _WAVES.setdefault(angles, {})
    key = scale, dtype, None if angles.is_inference() else angles._version
    if key not in kept:
        kept.clear()
        with torch.inference_mode(False), torch.no_grad():  # a training may use them, too
            cos, sin = (wave.mul_(scale).to(dtype) for wave in (angles.cos(), angles.sin()))
            sin[..., : angles.shape[-1] // 2].neg_()  # y stands where x did, its sign in the sine
            kept[key] = _by_head(cos).contiguous(), _by_head(sin).contiguous()
    return kept[key]


def _by_head(values: Tensor) -> Tensor:
    return values.permute(1, 2, 0, 3)


class _RotateHalves(torch.autograd.Function):
    """Works on a copy by head, where a wave's values lie as those that it multiplies."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ours = _by_head(values).clone(memory_format=torch.contiguous_format)
        swapped = ours.roll(values.shape[-1] // 2, -1)
        return swapped.mul_(sin).add_(ours.mul_(cos)).permute(2, 0, 1, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rotated: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        ours = _by_head(d_rotated).clone(memory_format=torch.contiguous_format)
        swapped = (ours * sin).roll(d_rotated.shape[-1] // 2, -1)
        return swapped.add_(ours.mul_(cos)).permute(2, 0, 1, 3), None, None
