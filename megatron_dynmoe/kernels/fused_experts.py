"""Triton: the two GEMMs of SwiGLU experts that take more with them than a product.

The first GEMM gathers its rows from the tokens as it loads them, and applies SwiGLU and the rows'
weights before it stores. The gradient of the second GEMM's input does the same the other way round.
So neither gathered rows nor the gradient of an activation pass through memory, and the activation
itself, which the backward pass needs once more, is computed again from what the first GEMM gave.

R is the number of rows, T of tokens, E of experts, D the hidden size, F the experts' FFN size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_dynmoe.kernels.grouped_gemm import add_product, dot_of, tile_of, tiles_of_rows
from megatron_dynmoe.kernels.operators import operator
from megatron_dynmoe.kernels.tiles import Way, launch, situation, tiled

# A program has two products, or several values of each place after its product.
WAYS = (
    Way(64, 64, 32, warps=8, stages=3),
    Way(128, 64, 64, warps=8, stages=3),
    Way(128, 128, 64, warps=8, stages=3, since=90),
    Way(64, 64, 64, warps=4, stages=4),
)
BACKWARD_WAYS = (*WAYS[:2], WAYS[3], Way(64, 128, 64, warps=8, stages=3))
NARROWEST = min(way.columns for way in BACKWARD_WAYS)


def multiply_and_activate(
    tokens_TD: Tensor, token_R: Tensor | None, probs_R: Tensor, weight_E2FD: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """First GEMM: ``gate, up = weight @ token``, and ``prob * silu(gate) * up``.

    Args:
        tokens_TD: [T, D], contiguous, floating.
        token_R: [R] int64, the token of each row, the rows of expert 0 first; None: row r is token
            r.
        probs_R: [R] float32, the rows' weights.
        weight_E2FD: [E, 2F, D], contiguous, dtype of the tokens, gate rows first.
        ends_E: [E] int32, the index after each expert's last row; at most R.

    Returns:
        [R, 2F], gate and up, and [R, F], both in the dtype of the tokens. The activation is
        computed from the rounded gate and up. Rows after those of the last expert are not written.
    """
    num_rows, double = len(probs_R), weight_E2FD.shape[1]
    gate_up_R2F = tokens_TD.new_empty(num_rows, double)
    activated_RF = tokens_TD.new_empty(num_rows, double // 2)
    gate_and_up(tokens_TD, token_R, probs_R, weight_E2FD, ends_E, gate_up_R2F, activated_RF)
    return gate_up_R2F, activated_RF


@operator("gate_up_R2F", "activated_RF")
def gate_and_up(
    tokens_TD: Tensor, token_R: Tensor | None, probs_R: Tensor, weight_E2FD: Tensor,
    ends_E: Tensor, gate_up_R2F: Tensor, activated_RF: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel of :func:`multiply_and_activate`."""
    num_experts, inner = len(weight_E2FD), tokens_TD.shape[1]
    num_rows, columns = activated_RF.shape
    if not num_rows:
        return
    launch(
        _gate_and_up, tiles_of_rows(num_rows, num_experts, columns),
        tokens_TD, token_R, probs_R, weight_E2FD, gate_up_R2F, activated_RF, ends_E,
        num_experts, inner, columns, situation(num_rows),
        WIDTH=triton.next_power_of_2(num_experts), **dot_of(tokens_TD),
    )  # fmt: skip


def differentiate_activation(
    d_output_TD: Tensor,
    token_R: Tensor | None,
    probs_R: Tensor,
    weight_EDF: Tensor,
    gate_up_R2F: Tensor,
    ends_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients behind the second GEMM, and the activation once more.

    Args:
        d_output_TD: [T, D], contiguous, the gradient of each token's sum (or of each row).
        weight_EDF: [E, D, F], contiguous, of the second GEMM.
        gate_up_R2F: [R, 2F], contiguous.

    The others are as for :func:`multiply_and_activate`.

    Returns:
        The gradient of gate and up, [R, 2F], that of the weights, [R] float32, and the activation,
        [R, F], to the bit that of the forward pass. Those of unused rows are arbitrary.
    """
    num_rows, double = gate_up_R2F.shape
    d_gate_up_R2F = torch.empty_like(gate_up_R2F)
    activated_RF = gate_up_R2F.new_empty(num_rows, double // 2)
    # Of each column tile, since without atomics each program needs its own place.
    parts = triton.cdiv(double // 2, NARROWEST)
    d_probs_RC = probs_R.new_zeros(num_rows, parts, dtype=torch.float32)
    gate_and_up_backward(
        *(d_output_TD, token_R, probs_R, weight_EDF, gate_up_R2F, ends_E),
        *(d_gate_up_R2F, d_probs_RC, activated_RF),
    )
    return d_gate_up_R2F, d_probs_RC.sum(dim=1), activated_RF


@operator("d_gate_up_R2F", "d_probs_RC", "activated_RF")
def gate_and_up_backward(
    d_output_TD: Tensor, token_R: Tensor | None, probs_R: Tensor, weight_EDF: Tensor,
    gate_up_R2F: Tensor, ends_E: Tensor,
    d_gate_up_R2F: Tensor, d_probs_RC: Tensor, activated_RF: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel of :func:`differentiate_activation`."""
    num_experts, inner, columns = weight_EDF.shape
    num_rows = len(gate_up_R2F)
    if not num_rows:
        return
    launch(
        _gate_and_up_backward, tiles_of_rows(num_rows, num_experts, columns),
        d_output_TD, token_R, probs_R, weight_EDF, gate_up_R2F,
        d_gate_up_R2F, d_probs_RC, activated_RF, ends_E,
        num_experts, inner, columns, d_probs_RC.shape[1], situation(num_rows),
        WIDTH=triton.next_power_of_2(num_experts), **dot_of(d_output_TD),
    )  # fmt: skip


@register_flop_formula(gate_and_up)
def _flops(tokens: Any, token: Any, probs_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    """FLOPs of [R, D] times [E, D, 2F], an expert a row."""
    return 2 * probs_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(gate_and_up_backward)
def _flops_backward(
    d_output: Any, token: Any, probs_shape: Any, weight_shape: Any, *_: Any, **__: Any
) -> int:
    """FLOPs of [R, D] times [E, D, F], an expert a row."""
    return 2 * probs_shape[0] * weight_shape[1] * weight_shape[2]


@triton.jit
def _rows_of_tokens(tokens_ptr, token_ptr, first_row, row, is_row, width):
    """Pointers to the first values of a tile's rows, [rows, 1]; the rows are gathered, or not."""
    token = first_row + row
    if token_ptr is not None:
        token = tl.load(token_ptr + token, mask=is_row, other=0)
    return tokens_ptr + token * width


@tiled("inner", "columns", ways=WAYS)
@triton.jit
def _gate_and_up(
    tokens_ptr, token_ptr, probs_ptr, weight_ptr, gate_up_ptr, activated_ptr, ends_ptr,
    num_experts, inner, columns, situation, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_INNER: tl.constexpr,
):  # fmt: skip
    expert, first_row, end, first_column = tile_of(
        ends_ptr, num_experts, columns, WIDTH, TILE_ROWS, TILE_COLUMNS
    )
    if expert >= num_experts:
        return
    row = tl.arange(0, TILE_ROWS)[:, None]
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    place = tl.arange(0, TILE_INNER)
    is_row, is_column = row < end - first_row, column < columns - first_column
    left_ptrs = _rows_of_tokens(tokens_ptr, token_ptr, first_row, row, is_row, inner)
    left_ptrs += place[None, :]
    gate_ptrs = weight_ptr + (expert.to(tl.int64) * 2 * columns + first_column) * inner
    gate_ptrs += column * inner + place[:, None]
    gate = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    up = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    to_up = columns * inner
    for at in range(0, inner, TILE_INNER):
        left = tl.load(left_ptrs, mask=is_row & (place[None, :] < inner - at), other=0.0)
        inside = is_column & (place[:, None] < inner - at)
        right = tl.load(gate_ptrs, mask=inside, other=0.0)
        gate = add_product(gate, left, right, PRECISION, WIDEN)
        right = tl.load(gate_ptrs + to_up, mask=inside, other=0.0)
        up = add_product(up, left, right, PRECISION, WIDEN)
        left_ptrs += TILE_INNER
        gate_ptrs += TILE_INNER
    dtype = gate_up_ptr.dtype.element_ty
    gate, up = gate.to(dtype), up.to(dtype)
    inside = is_row & is_column
    gate_ptrs = gate_up_ptr + first_row * 2 * columns + first_column + row * 2 * columns + column
    tl.store(gate_ptrs, gate, inside)
    tl.store(gate_ptrs + columns, up, inside)
    prob = tl.load(probs_ptr + first_row + row, mask=is_row, other=0.0)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    activated = (gate * tl.sigmoid(gate) * up * prob).to(dtype)
    activated_ptr += first_row * columns + first_column
    tl.store(activated_ptr + row * columns + column, activated, inside)


@tiled("inner", "columns", ways=BACKWARD_WAYS, changes="d_probs_ptr")
@triton.jit
def _gate_and_up_backward(
    d_output_ptr, token_ptr, probs_ptr, weight_ptr, gate_up_ptr,
    d_gate_up_ptr, d_probs_ptr, activated_ptr, ends_ptr,
    num_experts, inner, columns, parts, situation, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_INNER: tl.constexpr,
):  # fmt: skip
    expert, first_row, end, first_column = tile_of(
        ends_ptr, num_experts, columns, WIDTH, TILE_ROWS, TILE_COLUMNS
    )
    if expert >= num_experts:
        return
    row = tl.arange(0, TILE_ROWS)[:, None]
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    place = tl.arange(0, TILE_INNER)
    is_row, is_column = row < end - first_row, column < columns - first_column
    left_ptrs = _rows_of_tokens(d_output_ptr, token_ptr, first_row, row, is_row, inner)
    left_ptrs += place[None, :]
    right_ptrs = weight_ptr + expert.to(tl.int64) * inner * columns + first_column
    right_ptrs += place[:, None] * columns + column
    d_weighted = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for at in range(0, inner, TILE_INNER):
        left = tl.load(left_ptrs, mask=is_row & (place[None, :] < inner - at), other=0.0)
        right = tl.load(right_ptrs, mask=is_column & (place[:, None] < inner - at), other=0.0)
        d_weighted = add_product(d_weighted, left, right, PRECISION, WIDEN)
        left_ptrs += TILE_INNER
        right_ptrs += TILE_INNER * columns
    # weighted = prob * silu(gate) * up
    inside = is_row & is_column
    here = first_row * 2 * columns + first_column
    there = row * 2 * columns + column
    gate = tl.load(gate_up_ptr + here + there, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + here + columns + there, mask=inside, other=0.0).to(tl.float32)
    prob = tl.load(probs_ptr + first_row + row, mask=is_row, other=0.0)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid  # gate is not needed any more
    activated = silu * up
    d_prob = tl.sum(d_weighted * activated, axis=1)
    d_prob_ptrs = d_probs_ptr + (first_row + row) * parts + first_column // TILE_COLUMNS
    tl.store(d_prob_ptrs, d_prob[:, None], is_row)
    dtype = gate_up_ptr.dtype.element_ty
    activated_ptr += first_row * columns + first_column
    tl.store(activated_ptr + row * columns + column, (activated * prob).to(dtype), inside)
    d_weighted *= prob
    d_up = d_weighted * silu
    tl.store(d_gate_up_ptr + here + columns + there, d_up.to(dtype), inside)
    d_gate = d_weighted * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(d_gate_up_ptr + here + there, d_gate.to(dtype), inside)
