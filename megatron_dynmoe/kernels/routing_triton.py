"""Triton: everything that a router does after its gate, in one pass forward and one backward.

A program takes ``BLOCK`` tokens of one sequence with all their experts. Its selection is exactly
:func:`megatron_dynmoe.routing.select.select` of the float32 probabilities that it has computed. It
sorts their bits as integers, because the bits of a float >= 0 have the same order as the float. It
sums them as 64-bit integers in the same units, and it breaks ties by expert index. The
probabilities themselves differ from PyTorch's softmax in their last bits. A token's routing
therefore agrees if no cumulative probability is within 1e-6 of the threshold.

The forward pass writes only weights and map; the backward pass computes the probabilities again
from the logits. Each program writes one partial sum over its tokens. There are no atomics, so runs
repeat bitwise.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dynmoe.kernels.operators import operator
from megatron_dynmoe.routing.normalize import EPSILON
from megatron_dynmoe.routing.route import Routing, check_positions
from megatron_dynmoe.routing.select import most_experts

ELEMENTS_PER_PROGRAM = 2048
# With half as many, the elements of a thread would not fit into its registers.
WARPS_FORWARD, WARPS_BACKWARD = 8, 16
NEVER_EXCEEDED = tl.constexpr(2**63 - 1)


def route_fused(
    logits_TE: Tensor,
    threshold: Tensor | float,
    *,
    theta: Tensor | None = None,
    max_experts: int | None = None,
    renormalize: bool = False,
    num_sequences: int = 1,
    valid_T: Tensor | None = None,
) -> Routing:
    """Route; arguments, result and errors as for :func:`megatron_dynmoe.routing.route.route`.

    The kernel takes 1 to 512 experts and at least one token.
    """
    check_positions(logits_TE, num_sequences)
    most = most_experts(logits_TE.shape[-1], max_experts)
    if not isinstance(threshold, Tensor):
        threshold = torch.full((1,), threshold, dtype=torch.float32, device=logits_TE.device)
    return Routing(
        *_RouteFused.apply(
            logits_TE.contiguous(),
            threshold.float(),
            theta,
            most,
            renormalize,
            num_sequences,
            valid_T,
        )
    )


class _RouteFused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        threshold: Tensor,
        theta: Tensor | None,
        most: int,
        renormalize: bool,
        num_sequences: int,
        valid_T: Tensor | None,
    ) -> tuple[Tensor, ...]:
        num_tokens, num_experts = logits_TE.shape
        grid, _ = _grid(logits_TE, num_sequences)
        device = logits_TE.device
        weights_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=device)
        map_TE = torch.empty(num_tokens, num_experts, dtype=torch.bool, device=device)
        experts_T = torch.empty(num_tokens, dtype=torch.int64, device=device)
        partial = (grid[0], num_sequences, num_experts)
        prob_sums = torch.empty(partial, dtype=torch.float32, device=device)
        assignments = torch.empty(partial, dtype=torch.int32, device=device)
        entropies = torch.empty(grid, dtype=torch.float32, device=device)
        not_finite = torch.empty(grid, dtype=torch.int32, device=device)
        route_forward(
            logits_TE, threshold, theta, valid_T,
            weights_TE, map_TE, experts_T, prob_sums, entropies, assignments, not_finite,
            most, num_sequences, renormalize,
        )  # fmt: skip
        ctx.save_for_backward(logits_TE, map_TE, theta, valid_T)
        ctx.num_sequences, ctx.renormalize = num_sequences, renormalize
        ctx.mark_non_differentiable(map_TE, experts_T)
        prob_sums_BE, entropy = torch.empty_like(prob_sums[0]), entropies.new_empty(())
        assignments_BE = torch.empty_like(assignments[0], dtype=torch.int64)
        num_not_finite = assignments_BE.new_empty(())
        add_up_parts(
            prob_sums, entropies, assignments, not_finite,
            prob_sums_BE, entropy, assignments_BE, num_not_finite,
        )  # fmt: skip
        ctx.mark_non_differentiable(assignments_BE, num_not_finite)
        return (
            weights_TE, map_TE, experts_T, prob_sums_BE, entropy, assignments_BE, num_not_finite
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_weights_TE: Tensor,
        _map: Any,
        _experts: Any,
        d_sums_BE: Tensor,
        d_entropy: Tensor,
        *_counts: Any,
    ) -> tuple[Tensor | None, ...]:
        logits_TE, map_TE, theta, valid_T = ctx.saved_tensors
        d_logits_TE = torch.empty_like(logits_TE)
        grid, _ = _grid(logits_TE, ctx.num_sequences)
        d_thetas = torch.empty(grid, dtype=torch.float32, device=logits_TE.device)
        route_backward(
            logits_TE, map_TE, theta, valid_T,
            d_weights_TE.contiguous(), d_sums_BE.contiguous(), d_entropy.contiguous(),
            d_logits_TE, d_thetas, ctx.num_sequences, ctx.renormalize,
        )  # fmt: skip
        d_theta = None if theta is None else d_thetas.sum().to(theta.dtype).view_as(theta)
        return d_logits_TE, None, d_theta, None, None, None, None


def _grid(logits_TE: Tensor, num_sequences: int) -> tuple[tuple[int, int], int]:
    """The programs of a sequence and the sequences, and how many tokens a program takes."""
    num_tokens, num_experts = logits_TE.shape
    num_positions = num_tokens // num_sequences
    most = max(1, ELEMENTS_PER_PROGRAM // _width(num_experts))
    block = min(most, triton.next_power_of_2(num_positions))
    return (triton.cdiv(num_positions, block), num_sequences), block


def _width(num_experts: int) -> int:
    return max(2, triton.next_power_of_2(num_experts))


def _settings(
    logits_TE: Tensor,
    theta: Tensor | None,
    valid_T: Tensor | None,
    num_sequences: int,
    renormalize: bool,
) -> dict[str, Any]:
    """The settings that both kernels share."""
    num_tokens, num_experts = logits_TE.shape
    return {
        "num_positions": num_tokens // num_sequences,
        "num_sequences": num_sequences,
        "num_experts": num_experts,
        "epsilon": EPSILON,
        "NORMALIZE": theta is not None,
        "RENORMALIZE": renormalize,
        "PADDED": valid_T is not None,
        "BLOCK": _grid(logits_TE, num_sequences)[1],
        "WIDTH": _width(num_experts),
    }


@operator(
    "weights_TE", "map_TE", "experts_T", "prob_sums", "entropies", "assignments", "not_finite"
)
def route_forward(
    logits_TE: Tensor, threshold: Tensor, theta: Tensor | None, valid_T: Tensor | None,
    weights_TE: Tensor, map_TE: Tensor, experts_T: Tensor,
    prob_sums: Tensor, entropies: Tensor, assignments: Tensor, not_finite: Tensor,
    most: int, num_sequences: int, renormalize: bool,
) -> None:  # fmt: skip
    """Launch the kernel of the forward pass; each of the last four tensors has a part a program."""
    grid, _ = _grid(logits_TE, num_sequences)
    _forward[grid](
        logits_TE, threshold, theta, valid_T,
        weights_TE, map_TE, experts_T, prob_sums, entropies, assignments, not_finite,
        most, **_settings(logits_TE, theta, valid_T, num_sequences, renormalize),
        TOP=max(2, triton.next_power_of_2(most)), num_warps=WARPS_FORWARD,
    )  # fmt: skip


@operator("prob_sums_BE", "entropy", "assignments_BE", "num_not_finite")
def add_up_parts(
    prob_sums: Tensor, entropies: Tensor, assignments: Tensor, not_finite: Tensor,
    prob_sums_BE: Tensor, entropy: Tensor, assignments_BE: Tensor, num_not_finite: Tensor,
) -> None:  # fmt: skip
    """Add up what the programs of :func:`route_forward` have summed, in a fixed order."""
    num_parts, num_sequences, num_experts = prob_sums.shape
    width = _width(num_experts)
    _add_up_parts[(num_sequences,)](
        prob_sums, entropies, assignments, not_finite,
        prob_sums_BE, entropy, assignments_BE, num_not_finite,
        num_parts, num_sequences, num_experts,
        PARTS=max(1, ELEMENTS_PER_PROGRAM // width), WIDTH=width,
    )  # fmt: skip


@operator("d_logits_TE", "d_thetas")
def route_backward(
    logits_TE: Tensor, map_TE: Tensor, theta: Tensor | None, valid_T: Tensor | None,
    d_weights_TE: Tensor, d_sums_BE: Tensor, d_entropy: Tensor,
    d_logits_TE: Tensor, d_thetas: Tensor, num_sequences: int, renormalize: bool,
) -> None:  # fmt: skip
    """Launch the kernel of the backward pass; ``d_thetas`` has a part for each program."""
    grid, _ = _grid(logits_TE, num_sequences)
    _backward[grid](
        logits_TE, map_TE, theta, valid_T, d_weights_TE, d_sums_BE, d_entropy,
        d_logits_TE, d_thetas, **_settings(logits_TE, theta, valid_T, num_sequences, renormalize),
        num_warps=WARPS_BACKWARD,
    )  # fmt: skip


@triton.jit
def _tokens(num_positions, num_sequences, BLOCK: tl.constexpr):
    """Return the indices of the tokens in this program's block, and which of them exist."""
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tokens = positions.to(tl.int64) * num_sequences + tl.program_id(1)
    return tokens, positions < num_positions


@triton.jit
def _probabilities(
    logits_ptr, theta_ptr, offsets, inside, columns, num_experts, epsilon,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Compute a block's probabilities, and what the gradients need beside them.

    Returns:
        The standardized logits, the scale and the sum of the raw logits ([BLOCK, 1] both), theta,
        and the probabilities. These are 0 in the padding columns.
    """
    standard = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(standard, axis=1, keep_dims=True)
    scale = tl.full([standard.shape[0], 1], 1.0, tl.float32)
    theta = 1.0
    real = columns < num_experts
    if NORMALIZE:
        theta = tl.load(theta_ptr).to(tl.float32)
        centered = tl.where(real, standard - total / num_experts, 0.0)
        variance = tl.sum(centered * centered, axis=1, keep_dims=True) / num_experts
        scale = 1.0 / tl.sqrt(variance + epsilon)
        standard = centered * scale
    scaled = tl.where(real, standard * theta, float("-inf"))
    powers = tl.exp(scaled - tl.max(scaled, axis=1, keep_dims=True))
    probs = powers / tl.sum(powers, axis=1, keep_dims=True)
    return standard, scale, total, theta, probs


@triton.jit
def _fixed_point(bits):
    """Convert the bits of a float32 in [0, 1] to units of 2**-60, truncated."""
    exponent = bits >> 23
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64)
    shift = exponent - 90  # the last bit of the mantissa is worth 2**(exponent - 150)
    left = tl.maximum(shift, 0).to(tl.int64)
    right = tl.minimum(tl.maximum(-shift, 0), 63).to(tl.int64)
    return tl.where(exponent > 0, (mantissa << left) >> right, 0)


@triton.jit
def _select(probs, columns, num_experts, threshold, cap, WIDTH: tl.constexpr, TOP: tl.constexpr):
    """Return the map and the number of experts of each token, [BLOCK, 1]."""
    is_nan = tl.sum((probs != probs).to(tl.int32), axis=1, keep_dims=True) > 0
    bits = probs.to(tl.int32, bitcast=True)
    bits = tl.where(columns < num_experts, bits, -1)
    bits = tl.where(is_nan, -1, bits)
    if TOP < WIDTH:  # noqa: SIM108 (decided while compiling)
        ordered = tl.topk(bits, TOP)
    else:
        ordered = tl.sort(bits, descending=True)
    units = tl.where(ordered >= 0, _fixed_point(tl.maximum(ordered, 0)), 0)
    before = tl.cumsum(units, axis=1) - units
    limit = tl.where(
        threshold > 0,
        _fixed_point(tl.minimum(threshold, 1.0).to(tl.int32, bitcast=True)),
        tl.where(threshold == 0, 0, -1).to(tl.int64),  # -1: it is NaN or below 0
    )
    limit = tl.where(threshold >= 1, NEVER_EXCEEDED, limit)
    kept = ((before <= limit) & (ordered >= 0)).to(tl.int32)
    experts = tl.sum(kept, axis=1, keep_dims=True)
    experts = tl.minimum(tl.maximum(experts, 1), cap)

    ranks = tl.arange(0, TOP)[None, :]
    least = tl.max(tl.where(ranks == experts - 1, ordered, -1), axis=1, keep_dims=True)
    above = bits > least
    equal = (bits == least) & (columns < num_experts)
    room = experts - tl.sum(above.to(tl.int32), axis=1, keep_dims=True)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=1) <= room))
    return tl.where(is_nan, columns == 0, chosen), experts


@triton.jit
def _forward(
    logits_ptr, threshold_ptr, theta_ptr, valid_ptr,
    weights_ptr, map_ptr, experts_ptr,
    prob_sums_ptr, entropies_ptr, assignments_ptr, not_finite_ptr,
    cap, num_positions, num_sequences, num_experts, epsilon,
    NORMALIZE: tl.constexpr, RENORMALIZE: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    tokens, exist = _tokens(num_positions, num_sequences, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    inside = exist[:, None] & (columns < num_experts)
    offsets = tokens[:, None] * num_experts + columns
    # 1. Normalize, softmax
    _, _, total, _, probs = _probabilities(
        logits_ptr, theta_ptr, offsets, inside, columns, num_experts, epsilon, NORMALIZE
    )
    # 2. Select
    threshold = tl.load(threshold_ptr)
    chosen, experts = _select(probs, columns, num_experts, threshold, cap, WIDTH, TOP)
    # 3. Weigh
    weights = tl.where(chosen, probs, 0.0)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=1, keep_dims=True)
    tl.store(weights_ptr + offsets, weights, mask=inside)
    tl.store(map_ptr + offsets, chosen, mask=inside)
    tl.store(experts_ptr + tokens, tl.sum(experts, axis=1).to(tl.int64), mask=exist)
    # 4. Sums over this program's tokens
    program = tl.program_id(0) * num_sequences + tl.program_id(1)
    # The comparison is false for NaN and for infinity.
    is_finite = tl.sum((tl.abs(total) < float("inf")).to(tl.int32), axis=1)
    tl.store(not_finite_ptr + program, tl.sum(tl.where(exist, 1 - is_finite, 0), axis=0))
    counted = exist
    if PADDED:
        counted = exist & (tl.load(valid_ptr + tokens, mask=exist, other=0) != 0)
    counted = counted[:, None] & (columns < num_experts)
    logs = tl.log(tl.where(probs > 1.17549435e-38, probs, 1.17549435e-38))
    entropy = tl.sum(tl.sum(tl.where(counted, -probs * logs, 0.0), axis=1), axis=0)
    tl.store(entropies_ptr + program, entropy)
    sums_at = program * num_experts + tl.arange(0, WIDTH)
    real = tl.arange(0, WIDTH) < num_experts
    prob_sums = tl.sum(tl.where(counted, probs, 0.0), axis=0)
    tl.store(prob_sums_ptr + sums_at, prob_sums, mask=real)
    assignments = tl.sum((counted & chosen).to(tl.int32), axis=0)
    tl.store(assignments_ptr + sums_at, assignments, mask=real)


@triton.jit
def _add_up_parts(
    prob_sums_ptr, entropies_ptr, assignments_ptr, not_finite_ptr,
    prob_sums_out, entropy_out, assignments_out, not_finite_out,
    num_parts, num_sequences, num_experts, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    prob_sums = tl.zeros([WIDTH], tl.float32)
    assignments = tl.zeros([WIDTH], tl.int64)
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        inside = (parts < num_parts)[:, None] & (columns < num_experts)[None, :]
        offsets = (parts[:, None] * num_sequences + sequence) * num_experts + columns[None, :]
        prob_sums += tl.sum(tl.load(prob_sums_ptr + offsets, mask=inside, other=0.0), axis=0)
        chosen = tl.load(assignments_ptr + offsets, mask=inside, other=0)
        assignments += tl.sum(chosen.to(tl.int64), axis=0)
    at = sequence * num_experts + columns
    tl.store(prob_sums_out + at, prob_sums, mask=columns < num_experts)
    tl.store(assignments_out + at, assignments, mask=columns < num_experts)
    if sequence == 0:  # the numbers of all sequences
        entropies = tl.zeros([PARTS], tl.float32)
        not_finite = tl.zeros([PARTS], tl.int64)
        for start in range(0, num_parts * num_sequences, PARTS):
            parts = start + tl.arange(0, PARTS)
            inside = parts < num_parts * num_sequences
            entropies += tl.load(entropies_ptr + parts, mask=inside, other=0.0)
            not_finite += tl.load(not_finite_ptr + parts, mask=inside, other=0).to(tl.int64)
        tl.store(entropy_out, tl.sum(entropies, axis=0))
        tl.store(not_finite_out, tl.sum(not_finite, axis=0))


@triton.jit
def _backward(
    logits_ptr, map_ptr, theta_ptr, valid_ptr, d_weights_ptr, d_sums_ptr, d_entropy_ptr,
    d_logits_ptr, d_thetas_ptr,
    num_positions, num_sequences, num_experts, epsilon,
    NORMALIZE: tl.constexpr, RENORMALIZE: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tokens, exist = _tokens(num_positions, num_sequences, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    inside = exist[:, None] & (columns < num_experts)
    offsets = tokens[:, None] * num_experts + columns
    standard, scale, _, theta, probs = _probabilities(
        logits_ptr, theta_ptr, offsets, inside, columns, num_experts, epsilon, NORMALIZE
    )
    chosen = tl.load(map_ptr + offsets, mask=inside, other=0) != 0
    d_weights = tl.load(d_weights_ptr + offsets, mask=inside, other=0.0)
    d_weights = tl.where(chosen, d_weights, 0.0)
    # 1. Sums. The entropy's gradient is -z plus a constant; the softmax's own backward pass removes
    #    the constant
    d_sums_at = d_sums_ptr + tl.program_id(1) * num_experts + columns
    d_probs = tl.load(d_sums_at, mask=columns < num_experts, other=0.0)
    d_probs = d_probs - tl.load(d_entropy_ptr) * theta * standard
    if PADDED:
        counted = tl.load(valid_ptr + tokens, mask=exist, other=0) != 0
        d_probs = tl.where(counted[:, None], d_probs, 0.0)
    # 2. Weights: renormalized, they are a softmax over the selected experts
    d_scaled = tl.zeros_like(probs)
    if RENORMALIZE:
        weights = tl.where(chosen, probs, 0.0)
        weights = weights / tl.sum(weights, axis=1, keep_dims=True)
        d_scaled = weights * (d_weights - tl.sum(weights * d_weights, axis=1, keep_dims=True))
    else:
        d_probs += d_weights
    d_scaled += probs * (d_probs - tl.sum(probs * d_probs, axis=1, keep_dims=True))
    # 3. Normalization
    if NORMALIZE:
        projection = tl.sum(d_scaled * standard, axis=1, keep_dims=True)
        d_theta = tl.sum(tl.sum(tl.where(exist[:, None], projection, 0.0), axis=1), axis=0)
        tl.store(d_thetas_ptr + tl.program_id(0) * num_sequences + tl.program_id(1), d_theta)
        d_scaled = (d_scaled - standard * (projection / num_experts)) * (scale * theta)
    tl.store(d_logits_ptr + offsets, d_scaled, mask=inside)
