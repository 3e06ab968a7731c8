"""``pytorch/attention/rope.py`` and ``common/fused_rope/fused_rope.cu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...not_stood_for import NotStoodFor, refuse
from ..device import check_on_device


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    interleaved: bool = False,
    fused: bool = False,
    **unused: Any,
) -> Tensor:
    """Rotate the first D2 of the last dimension of t, [S, B, N, D], in float32.

    Args:
        freqs: [S2, 1, 1, D2] float32 with S2 >= S and D2 <= D.
    """
    refuse(**{name: value for name, value in unused.items() if name not in ("cp_size", "cp_rank")})
    if tensor_format != "sbhd" or not fused:
        raise NotStoodFor("another format than sbhd, or unfused rotary embeddings")
    check_on_device(t=t, freqs=freqs)
    # csrc/extensions/apply_rope.cpp
    torch._check(freqs.dim() == 4 and t.dim() == 4, lambda: "expected 4D tensor")
    torch._check(freqs.shape[1] == freqs.shape[2] == 1, lambda: "expected freqs [S2, 1, 1, D2]")
    torch._check(freqs.dtype == torch.float32, lambda: "Dtype of the freqs tensor must be float")
    torch._check(freqs.shape[0] >= t.shape[0], lambda: "freqs is shorter than the sequence")
    torch._check(t.shape[-1] >= freqs.shape[-1], lambda: "freqs is wider than t")
    freqs = freqs[: len(t)]
    rotated, rest = t.split((freqs.shape[-1], t.shape[-1] - freqs.shape[-1]), dim=-1)
    wide = rotated.float()
    turned = (wide * freqs.cos() + _half_turned(wide, interleaved) * freqs.sin()).to(t.dtype)
    return torch.cat((turned, rest), dim=-1)


def _half_turned(t: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-t[..., 1::2], t[..., ::2]), dim=-1).flatten(-2)
    first, second = t.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_fused_qkv_rotary_pos_emb(*args: Any, **kwargs: Any) -> Tensor:
    """Only with Megatron's ``--fused-single-qkv-rope``-like setting, which is off."""
    raise NotStoodFor("apply_fused_qkv_rotary_pos_emb")
