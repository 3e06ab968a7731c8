"""``pytorch/module/layernorm_linear.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...not_stood_for import refuse
from .linear import Linear
from .norms import normalize


class LayerNormLinear(Linear):
    """``LayerNormLinear``: a norm, then a linear layer, with both's parameters in one module.

    Under sequence parallelism each rank normalizes its part of the sequence, and the normalized
    parts are gathered.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse(return_layernorm_output=return_layernorm_output)
        assert normalization in ("LayerNorm", "RMSNorm"), "Unsupported normalization type!"
        if kwargs.get("parallel_mode") == "row":
            raise NotImplementedError(
                "Normalization does not support tensor-parallel distribution."
            )
        # add_norm, which the constructor calls, reads these.
        self.eps, self.normalization = eps, normalization
        self.zero_centered_gamma = zero_centered_gamma
        super().__init__(in_features, out_features, **kwargs)
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                parameter.sequence_parallel = self.sequence_parallel

    def add_norm(self, **where: Any) -> None:
        """``layer_norm_weight``, and ``layer_norm_bias`` of a LayerNorm, come first."""
        first = torch.nn.init.zeros_ if self.zero_centered_gamma else torch.nn.init.ones_
        self.add_parameter("layer_norm_weight", (self.in_features,), first, **where)
        if self.normalization == "LayerNorm":
            zeros = torch.nn.init.zeros_
            self.add_parameter("layer_norm_bias", (self.in_features,), zeros, **where)
        else:
            self.layer_norm_bias = None

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """Normalize ``[..., in]``, then multiply."""
        weight, bias = self.layer_norm_weight, self.layer_norm_bias
        normed = normalize(self.prepare_forward(inp), weight, bias, self.eps, self)
        return super().forward(normed, is_first_microbatch)
