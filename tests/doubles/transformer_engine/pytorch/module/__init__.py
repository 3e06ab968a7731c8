"""``pytorch/module/__init__.py``."""

from typing import Any

from ...not_stood_for import NotStoodFor
from .grouped_linear import GroupedLinear
from .layernorm_linear import LayerNormLinear
from .linear import Linear
from .norms import LayerNorm, RMSNorm


class Fp8Padding:
    """``pytorch/module/fp8_padding.py``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotStoodFor("FP8")


Fp8Unpadding = Fp8Padding

__all__ = [
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
]
