"""``pytorch/module/grouped_linear.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...not_stood_for import refuse
from .base import TransformerEngineBaseModule, mark_partitioned
from .gemm import put_into_main_grad
from .linear import PARALLEL_MODES, _default_init


class GroupedLinear(TransformerEngineBaseModule):
    """``GroupedLinear``: ``weight{i}`` [out, in] multiplies the i-th group of rows."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
        ub_name: str | None = None,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__()
        refuse(
            single_grouped_weight=single_grouped_weight,
            single_grouped_bias=single_grouped_bias,
            **unused,
        )
        self.set_up_tensor_parallel(tp_group, tp_size, sequence_parallel)
        if self.tp_size > 1 and bias:
            raise ValueError("GroupedLinear doesn't support bias when TP > 1.")
        if parallel_mode not in PARALLEL_MODES:
            raise ValueError(f"parallel_mode {parallel_mode!r} not supported.")
        self.num_gemms = num_gemms
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.use_bias, self.return_bias = bias, return_bias
        self.apply_bias = bias and not return_bias
        self.rng_tracker_name = rng_tracker_name
        self.parallel_mode = parallel_mode
        self.single_grouped_weight = self.single_grouped_bias = False
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        where = {"device": device, "dtype": params_dtype or torch.get_default_dtype()}
        shape = (self.out_features, self.in_features)
        draw = init_method or _default_init
        for i in range(num_gemms):
            self.add_parameter(f"weight{i}", shape, draw, get_rng_state_tracker, **where)
            if bias:
                self.add_parameter(f"bias{i}", shape[:1], torch.nn.init.zeros_, **where)
        self.reset_parameters()
        for i in range(num_gemms):
            mark_partitioned(getattr(self, f"weight{i}"), 1 if parallel_mode == "row" else 0)

    def forward(
        self, inp: Tensor, m_splits: list[int] | Tensor, is_first_microbatch: bool | None = None
    ) -> Any:
        """Multiply the groups of rows that ``m_splits`` counts; groups may be empty.

        Args:
            m_splits: one count per GEMM, as whole numbers on the host or as a tensor. They add up
                to the number of rows.
        """
        if not isinstance(m_splits, Tensor):
            m_splits = torch.tensor(m_splits, dtype=torch.int64, device="cpu")
        if m_splits.shape != (self.num_gemms,):
            raise ValueError(
                f"Shape of splits tensor ({tuple(m_splits.shape)}) does not match number of GEMMs "
                f"({self.num_gemms})."
            )
        hidden = self.prepare_forward(inp)
        if hidden.shape[-1] != self.in_features:
            raise ValueError(
                f"Input tensor (shape={tuple(hidden.shape)}) is not compatible with weight tensor "
                f"(shape={(self.out_features, self.in_features)})"
            )
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        out = _MultiplyGroups.apply(
            hidden,
            m_splits.tolist(),
            self.fuse_wgrad_accumulation,
            bool(is_first_microbatch),
            *weights,
        )
        if not self.use_bias:
            return out
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        if self.return_bias:
            return out, biases
        groups = zip(out.split(m_splits.tolist()), biases, strict=True)
        return torch.cat([group + bias for group, bias in groups])


class _MultiplyGroups(torch.autograd.Function):
    """``_GroupedLinear``: ``torch.split`` checks that the counts add up to the rows.

    The gradient of a weight without rows is zero, not missing (``csrc/extensions/gemm.cpp``,
    te_general_grouped_gemm).
    """

    @staticmethod
    def forward(
        ctx: Any, inp: Tensor, splits: list[int], fuse: bool, overwrite: bool, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(inp, *weights)
        ctx.splits, ctx.fuse, ctx.overwrite, ctx.weights = splits, fuse, overwrite, weights
        rows = inp.reshape(-1, inp.shape[-1]).split(splits)
        groups = zip(rows, weights, strict=True)
        out = torch.cat([group @ weight.t() for group, weight in groups])
        return out.view(-1, *inp.shape[1:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inp, *weights = ctx.saved_tensors
        grads = grad.reshape(-1, grad.shape[-1]).split(ctx.splits)
        rows = inp.reshape(-1, inp.shape[-1]).split(ctx.splits)
        d_inp = torch.cat([g @ weight for g, weight in zip(grads, weights, strict=True)])
        d_weights: list[Tensor | None] = [
            g.t() @ group for g, group in zip(grads, rows, strict=True)
        ]
        if ctx.fuse:
            pairs = zip(ctx.weights, d_weights, strict=True)
            d_weights = [put_into_main_grad(w, d_w, ctx.overwrite) for w, d_w in pairs]
        return d_inp.view_as(inp), None, None, None, *d_weights
