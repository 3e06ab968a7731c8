"""ReLU routing: a token uses the experts whose gate is positive, as many as there are.

ReMoE (arXiv 2412.14711) has neither a softmax nor a top-k. The gate ``relu(x W)`` is the weight, so
the layer's output is continuous in the logits: an expert joins or leaves a token with weight zero.

The number of experts is held by an L1 loss on the gates, whose coefficient is steered. An expert's
gates count by its load: layer by layer, with k the target,

    L = lambda / T * sum_t sum_e f_e R(x_t)_e,    f_e = E / (k T) * (tokens that use expert e).

That is ``lambda / k`` times the load-balance loss (:mod:`megatron_dynmoe.routing.losses`) with
gates in place of probabilities, so ``prob_sums_BE`` of the result are sums of gates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dynmoe.routing.losses import sum_by_sequence
from megatron_dynmoe.routing.route import Routing, check_positions
from megatron_dynmoe.routing.select import choose_top_k


def route_relu(
    logits_TE: Tensor,
    *,
    max_experts: int | None = None,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
) -> Routing:
    """Route by ``R(x) = relu(logits)``: the weights are the gates, the experts those above zero.

    A token may have no expert. A token with NaN gets the first one, with weight NaN: a run that has
    gone wrong then ends in Megatron's own check for NaN.

    Args:
        logits_TE: [T, E], any floating dtype. The computation is in float32, or in float64 if the
            logits are float64. Tokens are ordered as ``position * num_sequences + sequence``.
        max_experts: the cap, or None. A token keeps its largest gates, ties by expert index.
        num_sequences: B.
        valid_T: [T], bool, False for padding. Padding is routed, but no sum includes it.

    Returns:
        See :class:`Routing`. ``prob_sums_BE`` are sums of all gates, those that the cap has cut
        included, so that the L1 loss reaches them, too. A gate is no distribution: its entropy is
        reported as 0.

    Raises:
        ValueError: the number of tokens is not a multiple of ``num_sequences``.
    """
    check_positions(logits_TE, num_sequences)
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    is_nan_T1 = logits_TE.isnan().any(dim=-1, keepdim=True)
    gates_TE = logits_TE.masked_fill(is_nan_T1, torch.nan).relu()
    map_TE = gates_TE > 0
    if max_experts is not None and max_experts < logits_TE.shape[1]:
        ids_TK, _ = choose_top_k(gates_TE.detach().nan_to_num(), max_experts)
        map_TE &= torch.zeros_like(map_TE).scatter(-1, ids_TK, True)
    map_TE[:, :1] |= is_nan_T1
    return Routing(
        gates_TE.where(map_TE, 0.0),
        map_TE,
        experts_T=map_TE.sum(dim=-1),
        prob_sums_BE=sum_by_sequence(gates_TE, num_sequences, valid_T),
        entropy=gates_TE.new_zeros(()),
        assignments_BE=sum_by_sequence(map_TE, num_sequences, valid_T),
        not_finite=(~logits_TE.isfinite().all(dim=-1)).sum(),
    )
