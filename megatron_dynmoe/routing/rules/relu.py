"""ReLU routing: a token uses the experts whose gate is positive, as many as there are.

ReMoE (arXiv 2412.14711) has neither a softmax nor a top-k. The gate ``relu(x W)`` is the weight, so
the layer's output is continuous in the logits: an expert joins or leaves a token with weight zero.

The number of experts is held by an L1 loss on the gates, whose coefficient is steered. An expert's
gates count by its load: layer by layer, with k the target,

    L = lambda / T * sum_t sum_e f_e R(x_t)_e,    f_e = E / (k T) * (tokens that use expert e).

That is ``lambda / k`` times the load-balance loss (:mod:`megatron_dynmoe.routing.losses`) with
gates in place of probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dynmoe.routing.select import capped


def choose_open(logits_TE: Tensor, max_experts: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the experts of each token by ``R(x) = relu(logits)``.

    A token may have no expert. A token with NaN gets the first one, with weight NaN: a run that has
    gone wrong then ends in Megatron's own check for NaN.

    Args:
        logits_TE: [T, E], floating.
        max_experts: the cap, or None. A token keeps its largest gates, ties by expert index.

    Returns:
        All gates; the routing map, bool; and the weights, which are the gates of the chosen experts
        and zero elsewhere. All [T, E].
    """
    is_nan_T1 = logits_TE.isnan().any(dim=-1, keepdim=True)
    gates_TE = logits_TE.masked_fill(is_nan_T1, torch.nan).relu()
    map_TE = capped(gates_TE > 0, gates_TE, max_experts)
    map_TE[:, :1] |= is_nan_T1
    return gates_TE, map_TE, gates_TE.where(map_TE, 0.0)
