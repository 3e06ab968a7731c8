"""Activations of experts that the backward pass computes again, instead of keeping them.

``--recompute-granularity selective --recompute-modules moe_act`` is upstream's flag for the
experts' activations. With it the stacked experts keep neither these nor, if one rank has all
experts, their input rows: only the first GEMM's output is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

MODULE = "moe_act"  # of --recompute-modules


class _Again(NamedTuple):
    compute: Callable[[], Tensor]


def recomputes_activations(config: TransformerConfig) -> bool:
    """Whether the experts' activations are computed again; Megatron's arguments do as well."""
    modules: Any = config.recompute_modules or ()
    return config.recompute_granularity == "selective" and MODULE in modules


@contextlib.contextmanager
def computed_again(tensor: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Let what runs within keep a function for its backward pass instead of a tensor.

    Args:
        tensor: the one that is not kept.
        compute: gives the same numbers. It may hold tensors, which are kept until then.
    """

    left_out = id(tensor)  # autograd keeps these functions, and what they refer to

    def pack(saved: Tensor) -> Tensor | _Again:
        return _Again(compute) if id(saved) == left_out else saved

    def unpack(kept: Tensor | _Again) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept.compute()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
