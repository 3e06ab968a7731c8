"""Everything a router does after its gate, forward and backward, in one differentiable step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dynmoe import kernels
from megatron_dynmoe.routing.normalize import standardize
from megatron_dynmoe.routing.select import select_and_count

# On a CPU the tokens are taken in blocks whose temporaries stay in its caches: fresh memory for
# every temporary of all tokens costs more time than the arithmetic.
CPU_BLOCK_ELEMENTS = 1 << 17


class Routing(NamedTuple):
    """What becomes of the logits of one micro-batch; B sequences, or 1 for all tokens as one."""

    weights_TE: Tensor  # [T, E], zero where not selected; differentiable
    map_TE: Tensor  # [T, E] bool
    experts_T: Tensor  # [T] int64, the experts of each token
    prob_sums_BE: Tensor  # [B, E], probabilities summed over valid tokens; differentiable
    entropy: Tensor  # scalar, in nats, of the probabilities, summed over valid tokens; likewise
    assignments_BE: Tensor  # [B, E] int64, valid tokens that chose each expert


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
    """
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
        blocks = [
            _route_block(
                logits_TE[rows],
                threshold,
                theta,
                max_experts,
                renormalize,
                num_sequences,
                None if valid_T is None else valid_T[rows],
            )
            for rows in _blocks(logits_TE, num_sequences)
        ]
        routed = blocks[0] if len(blocks) == 1 else _join(blocks)
        standard_TE = logits_TE if theta is None else routed.standard_TE
        ctx.save_for_backward(
            standard_TE,
            routed.scale_T1,
            routed.probs_TE,
            routed.weights_TE if renormalize else routed.selected_TE,
            theta,
            valid_T,
        )
        ctx.renormalize = renormalize
        outputs = Routing(*(getattr(routed, name) for name in Routing._fields))
        ctx.mark_non_differentiable(outputs.map_TE, outputs.experts_T, outputs.assignments_BE)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weights_TE, _map, _experts, d_sums_BE, d_entropy, _assignments):
        standard_TE, scale_T1, probs_TE, chosen_TE, theta, valid_T = ctx.saved_tensors
        num_sequences, num_experts = d_sums_BE.shape
        d_logits_TE = torch.empty_like(probs_TE)
        d_theta = None if theta is None else torch.zeros_like(theta)
        for rows in _blocks(probs_TE, num_sequences):
            standard, probs = standard_TE[rows], probs_TE[rows]
            # 1. Sums: with respect to the probabilities; the entropy's is -z and a constant, which
            #    the softmax's own backward takes away
            d_entropy_TE = standard * (-d_entropy if theta is None else -d_entropy * theta)
            d_probs = d_entropy_TE.view(-1, num_sequences, num_experts).add_(d_sums_BE)
            d_probs = d_probs.view_as(probs)
            if valid_T is not None:
                d_probs *= valid_T[rows].unsqueeze(-1)
            # 2. Weights: renormalised, they are a softmax over the selected experts
            if not ctx.renormalize:
                d_probs.addcmul_(d_weights_TE[rows], chosen_TE[rows])
            d_scaled = _softmax_backward(d_probs, probs)
            if ctx.renormalize:
                d_scaled += _softmax_backward(d_weights_TE[rows], chosen_TE[rows])
            # 3. Normalization; the gradient of a softmax sums to 0, so its mean needs no removing
            if theta is None:
                d_logits_TE[rows] = d_scaled
                continue
            projection_T1 = torch.linalg.vecdot(d_scaled, standard).unsqueeze(-1)
            d_theta += projection_T1.sum()
            d_scaled.addcmul_(standard, projection_T1, value=-1 / num_experts)
            torch.mul(d_scaled, scale_T1[rows] * theta, out=d_logits_TE[rows])
        return d_logits_TE, None, d_theta, None, None, None, None


class _Block(NamedTuple):
    """The fields of Routing, and what the backward pass needs, of some of the tokens."""

    weights_TE: Tensor
    map_TE: Tensor
    experts_T: Tensor
    prob_sums_BE: Tensor
    entropy: Tensor
    assignments_BE: Tensor
    probs_TE: Tensor
    selected_TE: Tensor
    standard_TE: Tensor | None
    scale_T1: Tensor | None


def _route_block(
    logits_TE: Tensor,
    threshold: Tensor | float,
    theta: Tensor | None,
    max_experts: int | None,
    renormalize: bool,
    num_sequences: int,
    valid_T: Tensor | None,
) -> _Block:
    standard_TE = scale_T1 = None
    scaled_TE = logits_TE
    if theta is not None:
        standard_TE, scale_T1 = standardize(logits_TE)
        scaled_TE = theta * standard_TE
    probs_TE = torch.softmax(scaled_TE, dim=-1)
    selected_TE, experts_T = select_and_count(probs_TE, threshold, max_experts)
    weights_TE = probs_TE * selected_TE
    if renormalize:
        weights_TE /= weights_TE.sum(dim=-1, keepdim=True)

    counted_TE, chosen_TE = probs_TE, selected_TE
    if valid_T is not None:
        valid_T1 = valid_T.unsqueeze(-1)
        counted_TE, chosen_TE = probs_TE * valid_T1, selected_TE * valid_T1
    # A probability that has underflowed to 0 has no logarithm, and no part in the entropy.
    log_probs_TE = probs_TE.clamp(min=torch.finfo(probs_TE.dtype).tiny).log_()
    by_sequence = (-1, num_sequences, logits_TE.shape[-1])
    return _Block(
        weights_TE=weights_TE,
        map_TE=selected_TE.bool(),
        experts_T=experts_T,
        prob_sums_BE=counted_TE.view(by_sequence).sum(dim=0),
        entropy=torch.linalg.vecdot(counted_TE, log_probs_TE).sum().neg(),
        # Whole numbers below 2**24 are exact in float32: there are no more tokens in a block.
        assignments_BE=chosen_TE.view(by_sequence).sum(dim=0).long(),
        probs_TE=probs_TE,
        selected_TE=selected_TE,
        standard_TE=standard_TE,
        scale_T1=scale_T1,
    )


def _join(blocks: list[_Block]) -> _Block:
    """One block of the tokens of all."""

    def join(name: str, parts: tuple[Tensor | None, ...]) -> Any:
        if parts[0] is None:
            return None
        of_tokens = name.rpartition("_")[2].startswith("T")
        return torch.cat(parts) if of_tokens else sum(parts)  # type: ignore[arg-type]

    columns = zip(_Block._fields, zip(*blocks, strict=True), strict=True)
    return _Block(**{name: join(name, parts) for name, parts in columns})


def _blocks(values_TE: Tensor, num_sequences: int) -> list[slice]:
    """Slices of whole positions (one token of each sequence); one slice but on a CPU."""
    num_tokens, num_experts = values_TE.shape
    step = max(num_tokens, 1)
    if values_TE.is_cpu:
        step = max(1, CPU_BLOCK_ELEMENTS // (num_sequences * num_experts)) * num_sequences
    return [slice(start, start + step) for start in range(0, num_tokens, step)]


def _softmax_backward(gradient: Tensor, output: Tensor) -> Tensor:
    """``output * (gradient - sum(output * gradient))`` in one pass."""
    return torch.ops.aten._softmax_backward_data(gradient, output, -1, output.dtype)
