"""Null experts: a token fills K slots with experts and with slots that cost nothing.

The controller moves the share of tokens that an expert takes. The bias of the null slots is the
quantile, over the last global batch, at which the tokens would have taken that share.

From *Improving MoE Compute Efficiency by Composing Weight and Data Sparsity* and LongCat-Flash; see
docs/rules.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dynmoe.moe.rules.rule import Rule
from megatron_dynmoe.routing.route import Routing, scale, summed
from megatron_dynmoe.routing.rules import quantiles
from megatron_dynmoe.routing.rules.null_experts import Slots, fill_slots, null_crossings
from megatron_dynmoe.routing.select import most_experts
from megatron_dynmoe.settings.config import DynMoEConfig

# The bias stays within this, also if no share of the tokens fits.
LARGEST_BIAS = 50.0
# Tokens of which the first bias is computed. The first global batch replaces it.
_FIRST_TOKENS = 4096


class NullExperts(Rule):
    """See :mod:`megatron_dynmoe.routing.rules.null_experts`; the cap is K, a token's slots.

    State: ``share``, [1], the share of all tokens that an expert is to take on average;
    ``null_bias``, [1], added to the null logit for the choice alone.
    """

    knob = "share"
    direction = 1  # experts that take more tokens are more experts per token
    entries = ("share", "null_bias")
    extra_logits = 1  # that of the null slots
    # The crossings in each bin around the bias, and the bias times their number.
    num_sums = quantiles.NUM_BINS + 1
    pools = True  # layers with one share have one bias

    def __init__(self, dynmoe: DynMoEConfig, first: float | None, num_experts: int) -> None:
        super().__init__(dynmoe, first, num_experts)
        assert dynmoe.null_slots is not None
        self.null_slots = dynmoe.null_slots
        self.slots = most_experts(num_experts, self.cap(training=True))
        self.start(1.0)

    def start(self, logits_std: float) -> None:
        share = self.first_state["share"][0]
        shape = _FIRST_TOKENS, self.num_experts + 1
        logits_TL = torch.from_numpy(np.random.RandomState(0).standard_normal(shape)) * logits_std
        crossings = null_crossings(logits_TL, self.slots).flatten()
        above = 1 - min(share * self.num_experts / self.slots, 1.0)
        bias = float(crossings.sort().values[min(int(above * len(crossings)), len(crossings) - 1)])
        self.first_state = {"share": (share,), "null_bias": (round(bias, 4),)}

    def route(
        self,
        logits_TE: Tensor,
        state: Mapping[str, Tensor],
        *,
        training: bool,
        group: ProcessGroup | None,
        **batch: Any,
    ) -> Routing:
        return route_with_nulls(
            logits_TE,
            state["null_bias"],
            null_slots=self.null_slots,
            identity=self.dynmoe.null_kind == "identity",
            max_experts=self.cap(training),
            renormalize=self.dynmoe.weights == "renormalized",
            counted=training and torch.is_grad_enabled(),
            **batch,
        )

    def next_state(
        self, state: Mapping[str, Tensor], sums_RW: Tensor, next_knob_R1: Tensor | None
    ) -> Mapping[str, Tensor]:
        assert next_knob_R1 is not None
        counts_RN, biases_R = sums_RW[:, :-1], sums_RW[:, -1]
        biases_R = biases_R / counts_RN.sum(dim=-1)  # the mean of the layers, if they differ
        of_slots_R = next_knob_R1.squeeze(-1).double() * (self.num_experts / self.slots)
        next_R = quantiles.quantile(counts_RN, biases_R, of_slots_R)
        next_R1 = next_R.clamp(-LARGEST_BIAS, LARGEST_BIAS).float().unsqueeze(-1)
        return {"null_bias": torch.where(next_R1.isfinite(), next_R1, state["null_bias"])}

    @staticmethod
    def crossings(logits_TE: Tensor, max_experts: int | None) -> Tensor:
        """The share from which a token uses an expert: that of the crossings before its own."""
        crossings_TK = null_crossings(logits_TE, max_experts)
        places = crossings_TK.flatten().argsort(descending=True).argsort().view_as(crossings_TK)
        return (places.double() + 0.5) / (len(logits_TE) * (logits_TE.shape[1] - 1))


def route_with_nulls(
    logits_TL: Tensor,
    bias: Tensor | float,
    *,
    null_slots: int,
    theta: Tensor | None = None,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
    counted: bool = False,
    **how: Any,
) -> Routing:
    """Normalize, fill the slots, and sum up what losses and counters need.

    Args:
        logits_TL: [T, E + 1], any floating dtype, the null logit last. The computation is in
            float32, or in float64 if the logits are float64.
        bias, null_slots and how: as for :func:`fill_slots`.
        theta, num_sequences, valid_T: as for :meth:`Rule.route`.

    Returns:
        Weights, map and counts are those of the experts; float32 (or float64). ``sums_W`` are the
        crossings in each bin around the bias, and the bias times their number, if ``counted``.
    """
    logits_TL, scaled_TL = scale(logits_TL, theta, num_sequences)
    slots = fill_slots(scaled_TL, bias, null_slots=null_slots, **how)
    sums_W = _count(scaled_TL, bias, how["max_experts"], valid_T) if counted else None
    return summed(
        logits_TL,
        slots.among_experts_TE,
        slots.map_TE,
        slots.weights_TE,
        num_sequences,
        valid_T,
        entropy=_sum_entropy(slots, null_slots, valid_T),
        sums_W=sums_W,
        residual_T=slots.residual_T,
    )


@torch.no_grad()
def _count(
    logits_TL: Tensor, bias: Tensor | float, max_experts: int | None, valid_T: Tensor | None
) -> Tensor:
    crossings_TK = null_crossings(logits_TL, max_experts)
    biases_K = torch.as_tensor(bias).to(crossings_TK).expand(crossings_TK.shape[1])
    counts_N = quantiles.count(crossings_TK, biases_K, valid_T).view(len(biases_K), -1).sum(dim=0)
    return torch.cat([counts_N, biases_K[:1] * counts_N.sum()])


def _sum_entropy(slots: Slots, null_slots: int, valid_T: Tensor | None) -> Tensor:
    """The entropy over all E + M slots, in nats, summed over valid tokens: a scalar."""
    tiny = torch.finfo(slots.null_T.dtype).tiny  # log(0) must not reach the gradient
    entropy_T = -(slots.probs_TE * slots.probs_TE.clamp(min=tiny).log()).sum(dim=-1)
    entropy_T = entropy_T - slots.null_T * (slots.null_T / null_slots).clamp(min=tiny).log()
    return (entropy_T if valid_T is None else entropy_T * valid_T).sum()
