"""One GEMM per expert, over rows by expert, by the fastest code that a device has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNMENT_BYTES = 16  # grouped_mm wants rows whose size is a multiple of this


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiply the rows of each expert by its weight, transposed.

    Args:
        rows_RI: [R, I], the rows of expert 0 first.
        weight_EOI: [E, O, I] of the rows' dtype.
        tokens_per_expert: [E] int64, sums to R.

    Returns:
        [R, O].
    """
    device = rows_RI.device
    if len(rows_RI) and uses_grouped_mm(device, rows_RI.dtype, *weight_EOI.shape[1:]):
        ends = tokens_per_expert.to(device, non_blocking=True).cumsum(0, dtype=torch.int32)
        return _GroupedLinear.apply(rows_RI, weight_EOI, ends, tokens_per_expert)
    counts = tokens_per_expert.tolist() if len(rows_RI) else [0] * len(weight_EOI)
    return _LoopedLinear.apply(rows_RI, weight_EOI, counts)


def uses_grouped_mm(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether these GEMMs run as ``torch.nn.functional.grouped_mm``.

    On a GPU ``grouped_mm`` has a kernel only for bf16 on Hopper and later. In all other cases it
    copies the counts to the host and loops over experts. The loop in this module does the same, but
    mostly without the copy, because the dispatcher has already made it.
    :mod:`megatron_dynmoe.moe.fused` needs neither loop nor copy. On a CPU ``grouped_mm`` is 1.01 to
    1.13 times as fast as the loop (docs/backends.md).
    """
    if any(size * dtype.itemsize % ALIGNMENT_BYTES for size in sizes):
        return False
    if device.type != "cuda":
        return True
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)


class _GroupedLinear(torch.autograd.Function):
    """:func:`grouped_linear` with one call for all experts forward, and two calls backward.

    The derivative that PyTorch has for ``grouped_mm`` fails if the gradient is an expanded tensor.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends, counts_E)
        return torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        rows, weight, ends, counts_E = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = torch.nn.functional.grouped_mm(grad, weight, offs=ends)
        if not ctx.needs_input_grad[1]:
            return grad_rows, None, None, None
        if rows.device.type == "cpu" and _can_add(weight, rows):
            return grad_rows, _added(weight, grad, rows, counts_E.tolist()), None, None
        grad_weight = torch.nn.functional.grouped_mm(grad.t(), rows, offs=ends)
        return grad_rows, _zero_unused(grad_weight, counts_E == 0), None, None


def _zero_unused(grad_weight_EOI: Tensor, unused_E: Tensor) -> Tensor:
    """Zero the gradients of experts without a row, in place.

    On Blackwell ``grouped_mm`` returns something else for them (pytorch issue 172439, open). This
    is one more pass over the gradient, and the host does not wait for the device. If the counts are
    on the host, there is a pass only if an expert has no row, and on a CPU only over its part.
    """
    device = grad_weight_EOI.device
    if _are_on_host(unused_E):
        if not unused_E.any():
            return grad_weight_EOI
        if device.type == "cpu":
            for expert in unused_E.nonzero().flatten().tolist():
                grad_weight_EOI[expert].zero_()
            return grad_weight_EOI
    is_unused = unused_E.to(device, non_blocking=True).view(-1, 1, 1)
    return grad_weight_EOI.masked_fill_(is_unused, 0)


def _are_on_host(counts_E: Tensor) -> bool:
    """Whether looking at the counts takes no wait for a device."""
    return counts_E.device.type == "cpu"


class _LoopedLinear(torch.autograd.Function):
    """:func:`grouped_linear`, one expert at a time, without copies of rows or weights."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        output = rows.new_empty(len(rows), weight.shape[1])
        for expert, (rows_e, output_e) in enumerate(_groups(counts, rows, output)):
            torch.mm(rows_e, weight[expert].t(), out=output_e)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        for expert, (grad_e, grad_rows_e) in enumerate(_groups(ctx.counts, grad, grad_rows)):
            torch.mm(grad_e, weight[expert], out=grad_rows_e)
        if not ctx.needs_input_grad[1]:
            return grad_rows, None, None
        if _can_add(weight, rows):
            return grad_rows, _added(weight, grad, rows, ctx.counts), None
        grad_weight = torch.empty_like(weight)
        for expert, (rows_e, grad_e) in enumerate(_groups(ctx.counts, rows, grad)):
            torch.mm(grad_e.t(), rows_e, out=grad_weight[expert])  # zero if there are no rows
        return grad_rows, grad_weight, None


def _groups(counts: list[int], *tensors: Tensor) -> Any:
    return zip(*(tensor.split(counts) for tensor in tensors), strict=True)


def _can_add(weight: Tensor, rows: Tensor) -> bool:
    """Whether Megatron's buffer takes the products of these rows as they are."""
    parameter: Any = weight
    return adds_to_buffer(weight) and parameter.main_grad.dtype == rows.dtype


def _added(weight_EOI: Tensor, grad_RO: Tensor, rows_RI: Tensor, counts: list[int]) -> Tensor:
    """Add the weight's gradient to Megatron's buffer, expert by expert, while it is computed."""
    parameter: Any = weight_EOI
    used = sum(counts)  # a row buffer may have room for more
    buffers = parameter.main_grad.unbind()
    grads, rows = grad_RO[:used].t().split(counts, 1), rows_RI[:used].split(counts)
    for count, buffer_OI, grad_e, rows_e in zip(counts, buffers, grads, rows, strict=True):
        if count:
            # Not addmm_, which PyTorch's counter of FLOPs does not know
            torch.addmm(buffer_OI, grad_e, rows_e, out=buffer_OI)
    return in_buffer(weight_EOI)


def adds_to_buffer(weight: Tensor) -> bool:
    """Whether Megatron's DistributedDataParallel has a buffer for a weight's gradient.

    It says by ``grad_added_to_main_grad`` that it knows of gradients which are in it already. FSDP
    has the same name, and a buffer only from time to time.
    """
    if getattr(weight, "zero_out_wgrad", False) or hasattr(weight, "__fsdp_param__"):
        return False
    if not hasattr(weight, "grad_added_to_main_grad"):
        return False
    return getattr(weight, "main_grad", None) is not None


def in_buffer(weight: Tensor) -> Tensor:
    """Tell Megatron that a weight's gradient is in its buffer.

    Returns:
        What a backward pass returns in the gradient's place, of its shape and no meaning: the
        weight's hook adds no gradient then, but with --overlap-grad-reduce it asks for one.
    """
    parameter: Any = weight
    parameter.grad_added_to_main_grad = True
    return torch.empty_like(weight)
