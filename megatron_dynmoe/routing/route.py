"""From a gate's logits to weights and a routing map, step by step as in the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dynmoe.routing.losses import sum_by_sequence, sum_entropy
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.select import select, weigh


class Routing(NamedTuple):
    """The routing of one micro-batch of B sequences; B is 1 if all tokens count as one sequence."""

    weights_TE: Tensor  # [T, E], zero where not selected; differentiable
    map_TE: Tensor  # [T, E] bool
    experts_T: Tensor  # [T] int64, the number of experts of each token
    prob_sums_BE: Tensor  # [B, E], probabilities summed over valid tokens; differentiable
    entropy: Tensor  # scalar, in nats, summed over valid tokens; differentiable
    assignments_BE: Tensor  # [B, E] int64, the number of valid tokens that chose each expert
    not_finite: Tensor  # scalar int64, tokens with a NaN or infinite logit, including padding
    sums_W: Tensor | None = None  # [W] float64, what a rule sums beside these over valid tokens
    residual_T: Tensor | None = None  # [T], the weight of the token itself; differentiable

    def as_one_sequence(self) -> Routing:
        """The same with the sums over all sequences, B = 1."""
        if len(self.prob_sums_BE) == 1:
            return self
        return self._replace(
            prob_sums_BE=self.prob_sums_BE.sum(dim=0, keepdim=True),
            assignments_BE=self.assignments_BE.sum(dim=0, keepdim=True),
        )


def route(
    logits_TE: Tensor,
    threshold: Tensor | float,
    *,
    theta: Tensor | None = None,
    max_experts: int | None = None,
    renormalize: bool = False,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
) -> Routing:
    """Normalize, softmax, select, weigh, and sum up what losses and counters need.

    These lines are the method. :func:`megatron_dynmoe.kernels.choose_route` chooses between them
    and faster implementations. Those take the same arguments, and tests hold their results equal.

    Args:
        logits_TE: [T, E], any floating dtype. The computation is in float32, or in float64 if the
            logits are float64. Tokens are ordered as ``position * num_sequences + sequence``.
        threshold: a number or a tensor of one element.
        theta: [1], the scale of the normalized logits; None: they are not normalized.
        max_experts: the cap, or None.
        renormalize: True: a token's weights sum to 1. False: they are its probabilities.
        num_sequences: B.
        valid_T: [T], bool, False for padding. Padding is routed, but no sum includes it. None: no
            padding.

    Returns:
        See :class:`Routing`; float32 (or float64).

    Raises:
        ValueError: the number of tokens is not a multiple of ``num_sequences``, or the cap is
            below 1.
    """
    return route_by(
        lambda probs_TE: select(probs_TE, threshold, max_experts),
        logits_TE,
        theta=theta,
        renormalize=renormalize,
        num_sequences=num_sequences,
        valid_T=valid_T,
    )


def route_by(
    select_experts: Callable[[Tensor], Tensor],
    logits_TE: Tensor,
    *,
    theta: Tensor | None = None,
    renormalize: bool = False,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
) -> Routing:
    """Route as :func:`route` does, with any way to select experts by their probabilities.

    Args:
        select_experts: from probabilities [T, E] to the routing map [T, E] bool, also if the
            probabilities are NaN. It needs no gradient.
        logits_TE and the others: as for :func:`route`.
    """
    # 1. Normalize, softmax
    logits_TE, scaled_TE = scale(logits_TE, theta, num_sequences)
    probs_TE = scaled_TE.softmax(dim=-1)
    # 2. Select
    map_TE = select_experts(probs_TE)
    # 3. Weigh
    weights_TE = weigh(probs_TE, map_TE, renormalize)
    # 4. Sum up
    return summed(logits_TE, probs_TE, map_TE, weights_TE, num_sequences, valid_T)


def scale(logits_TE: Tensor, theta: Tensor | None, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Bring the logits into the dtype of the computation, and normalize them if theta is given.

    Returns:
        The logits and the normalized ones, both [T, E] float32 (or float64), contiguous.

    Raises:
        ValueError: the tokens do not fill whole positions.
    """
    check_positions(logits_TE, num_sequences)
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).contiguous()
    return logits_TE, logits_TE if theta is None else normalize(logits_TE, theta)


def summed(
    logits_TE: Tensor,
    probs_TE: Tensor,
    map_TE: Tensor,
    weights_TE: Tensor,
    num_sequences: int,
    valid_T: Tensor | None,
    *,
    entropy: Tensor | None = None,
    sums_W: Tensor | None = None,
    residual_T: Tensor | None = None,
) -> Routing:
    """Sum up what losses and counters need of a choice.

    Args:
        logits_TE: the gate's, before normalization; those of a rule may be more than E.
        probs_TE: what the losses are computed from.
        num_sequences, valid_T: as for :func:`route`.
        entropy, sums_W, residual_T: as in :class:`Routing`; without an entropy, that of
            ``probs_TE``.
    """
    return Routing(
        weights_TE,
        map_TE,
        experts_T=map_TE.sum(dim=-1),
        prob_sums_BE=sum_by_sequence(probs_TE, num_sequences, valid_T),
        entropy=sum_entropy(probs_TE, valid_T) if entropy is None else entropy,
        assignments_BE=sum_by_sequence(map_TE, num_sequences, valid_T),
        not_finite=(~logits_TE.isfinite().all(dim=-1)).sum(),
        sums_W=sums_W,
        residual_T=residual_T,
    )


def check_positions(logits_TE: Tensor, num_sequences: int) -> None:
    """Refuse tokens that do not fill whole positions; a position has one token per sequence."""
    if len(logits_TE) % num_sequences:
        raise ValueError(
            f"there are {len(logits_TE)} tokens, which is not a whole number of positions of "
            f"num_sequences {num_sequences}."
        )
