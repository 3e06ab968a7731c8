"""Expert threshold: an expert takes the tokens whose logit exceeds its own threshold.

The thresholds follow the quantiles of the logits over global batches (*Expert Threshold Routing*),
and a controller moves the share of tokens at which the quantiles are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.moe.rules.rule import Rule
from megatron_dynmoe.routing.route import Routing, scale, summed
from megatron_dynmoe.routing.rules import quantiles
from megatron_dynmoe.routing.rules.expert_threshold import choose_above_thresholds
from megatron_dynmoe.routing.select import most_experts
from megatron_dynmoe.settings.config import DynMoEConfig

# After n batches the last one counts at least START / (START + n) in the moving average, so that
# the thresholds keep up with the logits while these change fast.
START = 100.0


class ExpertThreshold(Rule):
    """See :mod:`megatron_dynmoe.routing.rules.expert_threshold` and ``quantiles`` beside it.

    State: ``share``, [1], the share of all tokens that an expert is to take; ``thresholds``, [E];
    ``batches``, [1], how many global batches the thresholds have been averaged over.
    """

    knob = "share"
    direction = 1  # experts that take more tokens are more experts per token
    entries = ("share", "thresholds", "batches")

    def __init__(self, dynmoe: DynMoEConfig, first: float | None, num_experts: int) -> None:
        super().__init__(dynmoe, first, num_experts)
        self.num_sums = num_experts * quantiles.NUM_BINS
        self.start(1.0)

    def start(self, logits_std: float) -> None:
        share = self.first_state["share"][0]
        # Shares of 0 and 1 have no quantile. A first batch corrects what is left out here.
        quantile = NormalDist(0, logits_std).inv_cdf(1 - min(max(share, 1e-6), 1 - 1e-6))
        self.first_state = {
            "share": (share,),
            "thresholds": (quantile,) * self.num_experts,
            "batches": (0.0,),
        }

    def route(
        self,
        logits_TE: Tensor,
        state: Mapping[str, Tensor],
        *,
        training: bool,
        group: Any,  # a token's experts do not depend on other tokens
        **batch: Any,
    ) -> Routing:
        return route(
            logits_TE,
            state["thresholds"],
            max_experts=self.cap(training),
            renormalize=self.dynmoe.weights == "renormalized",
            counted=training and torch.is_grad_enabled(),
            **batch,
        )

    def next_state(
        self, state: Mapping[str, Tensor], sums_RW: Tensor, next_knob_R1: Tensor | None
    ) -> Mapping[str, Tensor]:
        decay, thresholds_RE = self.dynmoe.threshold_decay, state["thresholds"]
        assert decay is not None and next_knob_R1 is not None
        batches_R1 = state["batches"]
        weights_R1 = (START / (START + batches_R1.double())).clamp(min=1 - decay)
        of_router = (
            each_R1.expand_as(thresholds_RE).flatten()
            for each_R1 in (state["share"], next_knob_R1, weights_R1)
        )
        next_RE = quantiles.next_thresholds(
            thresholds_RE.flatten(), sums_RW.reshape(thresholds_RE.numel(), -1), *of_router
        ).view_as(thresholds_RE)
        # A batch without tokens is none.
        batches_R1 = batches_R1 + (sums_RW.sum(dim=-1, keepdim=True) > 0)
        return {"thresholds": next_RE, "batches": batches_R1}

    @staticmethod
    def crossings(logits_TE: Tensor, max_experts: int | None) -> Tensor:
        """The share from which an expert takes a token: that of the tokens with larger logits."""
        num_tokens, num_experts = logits_TE.shape
        places_TE = logits_TE.argsort(dim=0, descending=True).argsort(dim=0)
        shares_TE = (places_TE.double() + 0.5) / num_tokens
        return shares_TE.sort(dim=-1).values[:, : most_experts(num_experts, max_experts)]


def route(
    logits_TE: Tensor,
    thresholds_E: Tensor,
    *,
    theta: Tensor | None = None,
    max_experts: int | None = None,
    renormalize: bool = False,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
    counted: bool = True,
) -> Routing:
    """Route a micro-batch.

    Args:
        logits_TE: [T, E], any floating dtype; computed in float32, or float64 if they are.
        thresholds_E, max_experts, renormalize: as for ``choose``.
        theta, num_sequences, valid_T: as for :func:`megatron_dynmoe.routing.route.route`.

    Returns:
        See :class:`Routing`. ``sums_W`` are the tokens in each bin of each expert, if ``counted``.
    """
    logits_TE, scaled_TE = scale(logits_TE, theta, num_sequences)
    chosen = choose_above_thresholds(scaled_TE, thresholds_E, max_experts, renormalize)
    sums_W = quantiles.count(scaled_TE, thresholds_E, valid_T).double() if counted else None
    return summed(logits_TE, *chosen, num_sequences, valid_T, sums_W=sums_W)
