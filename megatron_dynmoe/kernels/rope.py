"""Triton: rotary position embedding (RoPE) in one pass over queries or keys, forward and backward.

Takes the place of Transformer Engine's ``fused_apply_rotary_pos_emb`` in Megatron, which without it
uses twelve kernels that read and write six times the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dynmoe.kernels.operators import operator

ELEMENTS_PER_PROGRAM = 2048


def rotate(values: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of elements: ``(x cos a - y sin a, y cos b + x sin b)``.

    Cosines, sines and products are in float32, and the result is rounded once.

    Args:
        values: [S, B, H, D], any floating dtype; only the last dimension has to be contiguous.
        angles: [S or more, 1 or B, 1, R] float32, R <= D and even: a for the first element of a
            pair, b for the second. Elements from R on stay as they are.
        interleaved: pairs are (0, 1), (2, 3), ... instead of (0, R / 2), (1, R / 2 + 1), ...

    Returns:
        [S, B, H, D], dtype of the values, contiguous. Not differentiable in the angles.

    Raises:
        ValueError: the angles do not fit the values.
    """
    length, batch, _, width = values.shape
    fits = len(angles) >= length and angles.shape[1] in (1, batch) and angles.shape[2] == 1
    if not fits or angles.shape[-1] > width or angles.shape[-1] % 2:
        raise ValueError(f"angles {list(angles.shape)} do not fit values {list(values.shape)}.")
    return _Rotate.apply(values, angles.float().contiguous(), interleaved)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.interleaved = interleaved
        return _launched(values, angles, interleaved, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rotated: Tensor) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        return _launched(d_rotated, angles, ctx.interleaved, back=True), None, None


def _launched(values: Tensor, angles: Tensor, interleaved: bool, back: bool) -> Tensor:
    if values.stride(-1) != 1:
        values = values.contiguous()
    rotated = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    if rotated.numel():
        rotate_pairs(values, angles, rotated, interleaved, back)
    return rotated


@operator("rotated")
def rotate_pairs(
    values: Tensor, angles: Tensor, rotated: Tensor, interleaved: bool, back: bool
) -> None:
    """Launch the kernel; ``back`` gives the gradient of the values."""
    length, batch, heads, width = values.shape
    pairs = triton.next_power_of_2(triton.cdiv(width, 2))
    block = min(triton.next_power_of_2(heads), max(1, ELEMENTS_PER_PROGRAM // pairs))
    grid = (length * batch, triton.cdiv(heads, block))
    _rotate[grid](
        values, angles, rotated,
        values.stride(0), values.stride(1), values.stride(2),
        batch, heads, width, angles.shape[-1], angles.shape[1],
        INTERLEAVED=interleaved, BACK=back, HEADS=block, PAIRS=pairs,
    )  # fmt: skip


@triton.jit
def _rotate(
    values_ptr, angles_ptr, rotated_ptr, stride_s, stride_b, stride_h,
    batch, heads, width, num_angles, angles_batch,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    position = (tl.program_id(0) // batch).to(tl.int64)
    sequence = tl.program_id(0) % batch
    heads_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs_P = tl.arange(0, PAIRS)
    half = num_angles // 2
    first, second = pairs_P, pairs_P + half
    if INTERLEAVED:
        first, second = 2 * pairs_P, 2 * pairs_P + 1
    rotates = pairs_P < half

    angles_ptr += (position * angles_batch + sequence % angles_batch) * num_angles
    angle_a = tl.load(angles_ptr + first, mask=rotates, other=0.0)
    angle_b = tl.load(angles_ptr + second, mask=rotates, other=0.0)
    sin_a, sin_b = tl.sin(angle_a), tl.sin(angle_b)
    cos_a, cos_b = tl.cos(angle_a), tl.cos(angle_b)

    inside = (heads_H < heads)[:, None] & rotates[None, :]
    source = values_ptr + position * stride_s + sequence * stride_b + heads_H[:, None] * stride_h
    target = rotated_ptr + (
        (position * batch + sequence) * heads * width + heads_H[:, None] * width
    )
    x = tl.load(source + first[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + second[None, :], mask=inside, other=0.0).to(tl.float32)
    if BACK:  # the transpose
        new_x = x * cos_a[None, :] + y * sin_b[None, :]
        new_y = y * cos_b[None, :] - x * sin_a[None, :]
    else:
        new_x = x * cos_a[None, :] - y * sin_a[None, :]
        new_y = y * cos_b[None, :] + x * sin_b[None, :]
    tl.store(target + first[None, :], new_x, mask=inside)
    tl.store(target + second[None, :], new_y, mask=inside)

    # What does not rotate; PAIRS lanes twice are at least the width.
    for start in tl.static_range(0, 2):
        rest = num_angles + start * PAIRS + pairs_P
        inside = (heads_H < heads)[:, None] & (rest < width)[None, :]
        kept = tl.load(source + rest[None, :], mask=inside, other=0.0)
        tl.store(target + rest[None, :], kept, mask=inside)
