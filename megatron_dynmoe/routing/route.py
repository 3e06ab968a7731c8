"""Everything a router does after its gate, forward and backward, in one differentiable step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dynmoe import kernels
from megatron_dynmoe.routing.normalize import standardize
from megatron_dynmoe.routing.select import check_cap, select_and_count, tokens_not_finite

# On a CPU the tokens are taken in blocks whose temporaries stay in its caches: fresh memory for
# every temporary of all tokens costs more time than the arithmetic.
CPU_BLOCK_ELEMENTS = 1 << 18


class Routing(NamedTuple):
    """What becomes of the logits of one micro-batch; B sequences, or 1 for all tokens as one."""

    weights_TE: Tensor  # [T, E], zero where not selected; differentiable
    map_TE: Tensor  # [T, E] bool
    experts_T: Tensor  # [T] int64, the experts of each token
    prob_sums_BE: Tensor  # [B, E], probabilities summed over valid tokens; differentiable
    entropy: Tensor  # scalar, in nats, of the probabilities, summed over valid tokens; likewise
    assignments_BE: Tensor  # [B, E] int64, valid tokens that chose each expert
    not_finite: Tensor  # scalar int64, tokens with a logit that is NaN or infinite, padding too


def route(
    logits_TE: Tensor,
    threshold: Tensor | float,
    *,
    theta: Tensor | None = None,
    max_experts: int | None = None,
    renormalize: bool = False,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
    use_kernel: bool = True,
) -> Routing:
    """Normalize, softmax, select, weigh, and sum up what losses and counters need.

    The same as :func:`normalize`, ``softmax``, :func:`select` and :func:`weigh` one after another,
    with a gradient in closed form. Where :mod:`megatron_dynmoe.kernels` are available,
    a Triton kernel does it in one pass.

    Args:
        logits_TE: [T, E], any floating dtype; computed in float32 (float64 stays float64). Tokens
            are ordered as ``position * num_sequences + sequence``.
        threshold: a number or a tensor of one element.
        theta: [1], the scale of the normalized logits; None: they are not normalized.
        max_experts: the cap, or None.
        renormalize: whether a token's weights sum to 1 or are the probabilities.
        num_sequences: B.
        valid_T: [T], bool, False for padding, which is routed but enters no sum; None: no padding.
        use_kernel: False keeps to plain PyTorch on every device.

    Returns:
        See :class:`Routing`; float32 (or float64).

    Raises:
        ValueError: the tokens are no whole number of positions, or the cap is below 1.
    """
    if len(logits_TE) % num_sequences:
        raise ValueError(
            f"there are {len(logits_TE)} tokens, which are no whole number of positions of "
            f"num_sequences {num_sequences}."
        )
    check_cap(max_experts)
    logits_TE = logits_TE.contiguous()  # so that every result and gradient is, too
    if logits_TE.dtype != torch.float64:
        if use_kernel and logits_TE.numel() and kernels.available(logits_TE.device):
            from megatron_dynmoe.kernels.routing import fused_route

            return Routing(
                *fused_route(
                    logits_TE, threshold, theta, max_experts, renormalize, num_sequences, valid_T
                )
            )
        logits_TE = logits_TE.float()
    return Routing(
        *_PlainRoute.apply(
            logits_TE, threshold, theta, max_experts, renormalize, num_sequences, valid_T
        )
    )


class _PlainRoute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        threshold: Tensor | float,
        theta: Tensor | None,
        max_experts: int | None,
        renormalize: bool,
        num_sequences: int,
        valid_T: Tensor | None,
    ) -> tuple[Tensor, ...]:
        num_tokens, num_experts = logits_TE.shape
        by_sequence = (-1, num_sequences, num_experts)
        weights_TE, probs_TE = torch.empty_like(logits_TE), torch.empty_like(logits_TE)
        # Renormalised weights need no more for their gradient than themselves.
        chosen_TE = weights_TE if renormalize else torch.empty_like(logits_TE)
        map_TE = torch.empty_like(logits_TE, dtype=torch.bool)
        experts_T = torch.empty(num_tokens, dtype=torch.int64, device=logits_TE.device)
        standard_TE = torch.empty_like(logits_TE) if theta is not None else logits_TE
        scale_T1 = torch.empty_like(logits_TE[:, :1])
        prob_sums_BE = logits_TE.new_zeros(num_sequences, num_experts)
        assignments_BE = torch.zeros_like(prob_sums_BE, dtype=torch.int64)
        entropy = logits_TE.new_zeros(())
        not_finite = torch.zeros_like(entropy, dtype=torch.int64)
        for rows in _blocks(logits_TE, num_sequences):
            probs, weights = probs_TE[rows], weights_TE[rows]
            scratch = weights  # until there are weights: fresh memory would cost more than its use
            scaled = logits_TE[rows]
            not_finite += tokens_not_finite(scaled)
            if theta is not None:
                _, scale_T1[rows] = standardize(scaled, out=standard_TE[rows])
                scaled = torch.mul(standard_TE[rows], theta, out=scratch)
            torch.softmax(scaled, dim=-1, out=probs)
            # A probability that has underflowed to 0 has no logarithm, and no part in the entropy.
            log_probs = torch.clamp(probs, min=torch.finfo(probs.dtype).tiny, out=scratch).log_()
            counted = probs if valid_T is None else probs * valid_T[rows].unsqueeze(-1)
            entropy -= torch.dot(counted.reshape(-1), log_probs.reshape(-1))
            prob_sums_BE += counted.view(by_sequence).sum(dim=0)

            selected, experts_T[rows] = select_and_count(probs, threshold, max_experts)
            map_TE[rows] = selected
            torch.mul(probs, selected, out=weights)
            if renormalize:
                weights /= weights.sum(dim=-1, keepdim=True)
            else:
                chosen_TE[rows] = selected

            if valid_T is not None:
                selected = selected * valid_T[rows].unsqueeze(-1)
            # Whole numbers below 2**24, the tokens of a block, are exact in float32.
            assignments_BE += selected.view(by_sequence).sum(dim=0).long()
        ctx.save_for_backward(standard_TE, scale_T1, probs_TE, chosen_TE, theta, valid_T)
        ctx.renormalize = renormalize
        counts = assignments_BE, not_finite
        ctx.mark_non_differentiable(map_TE, experts_T, *counts)
        return weights_TE, map_TE, experts_T, prob_sums_BE, entropy, *counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weights_TE, _map, _experts, d_sums_BE, d_entropy, *_counts):
        standard_TE, scale_T1, probs_TE, chosen_TE, theta, valid_T = ctx.saved_tensors
        num_sequences, num_experts = d_sums_BE.shape
        d_logits_TE = torch.empty_like(probs_TE)
        d_theta = None if theta is None else torch.zeros_like(theta)
        for rows in _blocks(probs_TE, num_sequences):
            standard, probs = standard_TE[rows], probs_TE[rows]
            # 1. Sums: with respect to the probabilities; the entropy's is -z and a constant, which
            #    the softmax's own backward takes away
            d_logits = d_logits_TE[rows]
            d_entropy_TE = standard * (-d_entropy if theta is None else -d_entropy * theta)
            d_probs = d_entropy_TE.view(-1, num_sequences, num_experts).add_(d_sums_BE)
            d_probs = d_probs.view_as(probs)
            if valid_T is not None:
                d_probs *= valid_T[rows].unsqueeze(-1)
            # 2. Weights: renormalised, they are a softmax over the selected experts
            if not ctx.renormalize:
                d_probs.addcmul_(d_weights_TE[rows], chosen_TE[rows])
            d_scaled = _softmax_backward(d_probs, probs, out=d_logits)
            if ctx.renormalize:
                d_scaled += _softmax_backward(d_weights_TE[rows], chosen_TE[rows], out=d_probs)
            # 3. Normalization; the gradient of a softmax sums to 0, so its mean needs no removing
            if theta is not None:
                projection_T1 = torch.linalg.vecdot(d_scaled, standard).unsqueeze(-1)
                d_theta += projection_T1.sum()
                d_scaled.addcmul_(standard, projection_T1, value=-1 / num_experts)
                d_scaled *= scale_T1[rows] * theta
        return d_logits_TE, None, d_theta, None, None, None, None


def _blocks(values_TE: Tensor, num_sequences: int) -> list[slice]:
    """Slices of whole positions (one token of each sequence); one slice but on a CPU."""
    num_tokens, num_experts = values_TE.shape
    step = max(num_tokens, 1)
    if values_TE.is_cpu:
        step = max(1, CPU_BLOCK_ELEMENTS // (num_sequences * num_experts)) * num_sequences
    return [slice(start, start + step) for start in range(0, num_tokens, step)]


def _softmax_backward(gradient: Tensor, output: Tensor, out: Tensor) -> Tensor:
    """``output * (gradient - sum(output * gradient))`` in one pass."""
    return torch.ops.aten._softmax_backward_data.out(
        gradient, output, -1, output.dtype, grad_input=out
    )
