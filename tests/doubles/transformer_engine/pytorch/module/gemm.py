"""GEMM and the collectives around it: ``_Linear`` of ``pytorch/module/linear.py`` in parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import get_dummy_wgrad, group_size


class Multiply(torch.autograd.Function):
    """``inp @ weight.T``; the gradient of the weight may go straight into ``weight.main_grad``.

    ``overwrite``: the first microbatch of a step replaces what is in ``main_grad``, later ones add
    to it (``accumulate_wgrad_into_param_main_grad`` in ``_linear_backward``).
    """

    @staticmethod
    def forward(ctx: Any, inp: Tensor, weight: Tensor, fuse: bool, overwrite: bool) -> Tensor:
        assert inp.shape[-1] == weight.shape[1], "GEMM not possible"
        ctx.save_for_backward(inp, weight)
        ctx.weight, ctx.fuse, ctx.overwrite = weight, fuse, overwrite
        return inp @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inp, weight = ctx.saved_tensors
        d_inp = grad @ weight if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = grad.flatten(0, -2).t() @ inp.flatten(0, -2)
        if d_weight is not None and ctx.fuse:
            d_weight = put_into_main_grad(ctx.weight, d_weight, ctx.overwrite)
        return d_inp, d_weight, None, None


def put_into_main_grad(weight: Any, gradient: Tensor, overwrite: bool) -> Tensor | None:
    """Write a gradient where Megatron's data parallelism keeps it.

    Returns:
        What autograd gets instead: a dummy if the weight says so, else none.
    """
    if overwrite:
        weight.main_grad.copy_(gradient)
    else:
        weight.main_grad.add_(gradient)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    zero = getattr(weight, "zero_out_wgrad", False)
    return get_dummy_wgrad(list(weight.main_grad.shape), weight.dtype, zero=zero)


class GatherSequence(torch.autograd.Function):
    """``gather_along_first_dim``; backward the gradient is summed and scattered again."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gather(inp, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class ScatterSequence(torch.autograd.Function):
    """``reduce_scatter_along_first_dim``; backward the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _reduce_scatter(inp, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None


class SumBackward(torch.autograd.Function):
    """What goes into a column-parallel GEMM: each rank has a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return inp.view_as(inp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class SumForward(torch.autograd.Function):
    """What comes out of a row-parallel GEMM: each rank has a part of the sum (``allreduce``)."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, group: Any) -> Tensor:
        return _all_reduce(inp, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _gather(inp: Tensor, group: Any) -> Tensor:
    out = inp.new_empty(len(inp) * group_size(group), *inp.shape[1:])
    torch.distributed.all_gather_into_tensor(out, inp.contiguous(), group=group)
    return out


def _reduce_scatter(inp: Tensor, group: Any) -> Tensor:
    size = group_size(group)
    assert len(inp) % size == 0, f"Tensor length={len(inp)} can't be divided equally by {size}"
    out = inp.new_empty(len(inp) // size, *inp.shape[1:])
    torch.distributed.reduce_scatter_tensor(out, inp.contiguous(), group=group)
    return out


def _all_reduce(inp: Tensor, group: Any) -> Tensor:
    out = inp.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(out, group=group)
    return out
