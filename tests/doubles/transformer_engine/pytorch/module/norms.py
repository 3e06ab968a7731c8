"""``pytorch/module/rmsnorm.py`` and ``layernorm.py``, which are ``pytorch/ops/basic/``'s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...not_stood_for import refuse


def normalize(hidden: Tensor, weight: Tensor, bias: Tensor | None, eps: float, how: Any) -> Tensor:
    """``common/normalization``: statistics and products in float32, the result in the input's type.

    Args:
        how: the module, whose ``zero_centered_gamma`` adds 1 to the weight in float32. Without a
            bias the mean is not subtracted (RMSNorm).
    """
    wide = hidden.float()
    if bias is not None:
        wide = wide - wide.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    gamma = weight.float() + 1 if how.zero_centered_gamma else weight.float()
    out = wide * rstd * gamma
    return (out if bias is None else out + bias.float()).to(hidden.dtype)


class RMSNorm(torch.nn.Module):
    """``RMSNorm``: the input is cast to the weight's type; the last dimension is normalized."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        refuse(**unused)
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        first = torch.zeros if zero_centered_gamma else torch.ones
        where = {"device": device, "dtype": params_dtype}
        self.weight = torch.nn.Parameter(first(normalized_shape, **where))
        if self.has_bias:
            self.bias = torch.nn.Parameter(torch.zeros(normalized_shape, **where))
        if sequence_parallel is not None:
            for parameter in self.parameters():
                parameter.sequence_parallel = sequence_parallel

    has_bias = False

    def get_extra_state(self) -> Tensor:
        """``pytorch/ops/op.py``: an empty byte tensor without low precision."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """``pytorch/ops/op.py``: nothing to load."""
        refuse(extra_state=state is not None and state.numel())

    def forward(self, inp: Tensor) -> Tensor:
        """Normalize; the input's last dimensions have to be the weight's."""
        if inp.shape[-1:] != self.weight.shape:
            raise ValueError(
                f"Input tensor (shape={tuple(inp.shape)}) and weight tensor "
                f"(shape={tuple(self.weight.shape)}) are not compatible"
            )
        hidden = inp.contiguous().to(self.weight.dtype)
        return normalize(hidden, self.weight, getattr(self, "bias", None), self.eps, self)


class LayerNorm(RMSNorm):
    """``LayerNorm``: with mean and bias."""

    has_bias = True
