"""The experts of a rank as one autograd function over Triton's kernels.

What :mod:`megatron_dynmoe.moe.experts` does in four steps, each of which writes its result for the
next, is done here without gathered rows and without the gradient of the activation. The backward
pass needs the tokens and the first GEMM's output, and nothing else of the rows is kept. If the
weights are in Megatron's gradient buffer, their gradients are added to it at once, in the buffer's
own precision, instead of being written, read and added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dynmoe import kernels
from megatron_dynmoe.moe.grouped_linear import adds_to_buffer, in_buffer, uses_grouped_mm
from megatron_dynmoe.moe.permute import RowOrder, sums_of


def is_fused(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether experts of these sizes run so.

    Where PyTorch has a grouped GEMM of its own for a GPU, it stays the default until somebody has
    measured both; ``DYNMOE_KERNELS=fused`` asks for this one.
    """
    if not kernels.available(device) or dtype == torch.float64:
        return False
    return kernels.asked_for() == "fused" or not uses_grouped_mm(device, dtype, *sizes)


def fused_experts(
    tokens_TD: Tensor,
    probs_R: Tensor,
    weight_E2FD: Tensor,
    weight_EDF: Tensor,
    tokens_per_expert: Tensor,
    order: RowOrder | None = None,
) -> Tensor:
    """Run every row through its expert's SwiGLU, weight it, and sum up each token's rows.

    Args:
        tokens_TD: [T, D], floating but not float64.
        probs_R: [R] float32, the weights of the rows.
        weight_E2FD: [E, 2F, D] of the tokens' dtype, gate rows first.
        weight_EDF: [E, D, F].
        tokens_per_expert: [E] int64, on any device; sums to at most R.
        order: the tokens' rows; None: the tokens are rows already, those of expert 0 first.

    Returns:
        [T, D], differentiable in everything that is floating. Without ``order``, what follows the
        last expert's rows is not written.
    """
    ends_E = tokens_per_expert.to(tokens_TD.device, non_blocking=True).cumsum(0, dtype=torch.int32)
    return _FusedExperts.apply(tokens_TD, probs_R, weight_E2FD, weight_EDF, ends_E, order)


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens_TD: Tensor,
        probs_R: Tensor,
        weight_E2FD: Tensor,
        weight_EDF: Tensor,
        ends_E: Tensor,
        order: RowOrder | None,
    ) -> Tensor:
        from megatron_dynmoe.kernels.fused_experts import multiply_and_activate

        tokens_TD, token_R = tokens_TD.contiguous(), None if order is None else order.token_R
        gate_up_R2F, activated_RF = multiply_and_activate(
            tokens_TD, token_R, probs_R, weight_E2FD, ends_E
        )
        ctx.save_for_backward(tokens_TD, probs_R, weight_E2FD, weight_EDF, ends_E, gate_up_R2F)
        ctx.order = order
        return _summed(_product(activated_RF, weight_EDF.transpose(1, 2), ends_E), order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output_TD: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_dynmoe.kernels.fused_experts import differentiate_activation

        tokens_TD, probs_R, weight_E2FD, weight_EDF, ends_E, gate_up_R2F = ctx.saved_tensors
        token_R = None if ctx.order is None else ctx.order.token_R
        d_output_TD = d_output_TD.contiguous()
        d_gate_up_R2F, d_probs_R, activated_RF = differentiate_activation(
            d_output_TD, token_R, probs_R, weight_EDF, gate_up_R2F, ends_E
        )
        needs_tokens, needs_probs, needs_first, needs_second, *_ = ctx.needs_input_grad
        d_second = d_first = d_tokens_TD = None
        if needs_second:
            d_second = _weight_gradient(
                weight_EDF, d_output_TD, activated_RF, ends_E, token_R, None
            )
        del activated_RF
        if needs_first:
            d_first = _weight_gradient(weight_E2FD, d_gate_up_R2F, tokens_TD, ends_E, None, token_R)
        if needs_tokens:
            d_tokens_TD = _summed(_product(d_gate_up_R2F, weight_E2FD, ends_E), ctx.order)
        return d_tokens_TD, d_probs_R if needs_probs else None, d_first, d_second, None, None


def _product(rows_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """[R, O], by PyTorch's grouped GEMM where it has one."""
    if len(rows_RI) and uses_grouped_mm(rows_RI.device, rows_RI.dtype, *weight_EIO.shape[1:]):
        return torch.nn.functional.grouped_mm(rows_RI, weight_EIO, offs=ends_E)
    from megatron_dynmoe.kernels.grouped_gemm import multiply_rows

    return multiply_rows(rows_RI, weight_EIO, ends_E)


def _summed(rows_RD: Tensor, order: RowOrder | None) -> Tensor:
    return rows_RD if order is None else sums_of(rows_RD, order)


def _weight_gradient(
    weight_EOI: Tensor,
    left: Tensor,
    right: Tensor,
    ends_E: Tensor,
    left_row_R: Tensor | None,
    right_row_R: Tensor | None,
) -> Tensor:
    """The gradient, or if Megatron has a buffer for it, something of its shape and no meaning."""
    from megatron_dynmoe.kernels.grouped_gemm import multiply_by_rows

    operands = left, right, ends_E, left_row_R, right_row_R
    if not adds_to_buffer(weight_EOI):
        return multiply_by_rows(*operands)
    parameter: Any = weight_EOI
    multiply_by_rows(*operands, add_to=parameter.main_grad)
    return in_buffer(weight_EOI)
