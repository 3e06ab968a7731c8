"""``pytorch/module/linear.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...not_stood_for import refuse
from .base import TransformerEngineBaseModule, mark_partitioned
from .gemm import GatherSequence, Multiply, ScatterSequence, SumBackward, SumForward

PARALLEL_MODES = ("row", "column", None)  # pytorch/constants.py, GemmParallelModes


class Linear(TransformerEngineBaseModule):
    """``Linear``: ``weight`` is [out, in] of this rank; a bias that is returned is not added."""

    def __init__(
        self,
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
        **unused: Any,
    ) -> None:
        super().__init__()
        refuse(**unused)
        assert parallel_mode in PARALLEL_MODES, f"parallel_mode {parallel_mode} not supported"
        self.set_up_tensor_parallel(tp_group, tp_size, sequence_parallel)
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.use_bias, self.return_bias = bias, return_bias
        self.apply_bias = bias and not return_bias
        self.rng_tracker_name = rng_tracker_name
        self.parallel_mode = parallel_mode
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        where = {"device": device, "dtype": params_dtype or torch.get_default_dtype()}
        self.add_norm(**where)
        init_method = init_method or _default_init
        shape = (self.out_features, self.in_features)
        self.add_parameter("weight", shape, init_method, get_rng_state_tracker, **where)
        if bias:
            self.add_parameter("bias", shape[:1], torch.nn.init.zeros_, **where)
        else:
            self.bias = torch.empty(0, **where)
        self.reset_parameters()
        mark_partitioned(self.weight, 1 if parallel_mode == "row" else 0)
        if bias and parallel_mode == "column":
            mark_partitioned(self.bias, 0)
        elif bias and parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel

    def add_norm(self, **where: Any) -> None:
        """The parameters that :class:`LayerNormLinear` has before its weight."""

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """``[..., in]`` to ``[..., out]``, and the bias with ``return_bias``."""
        hidden = self.prepare_forward(inp)
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                hidden = GatherSequence.apply(hidden, self.tp_group)
            elif self.tp_size > 1:
                hidden = SumBackward.apply(hidden, self.tp_group)
        fuse = self.fuse_wgrad_accumulation
        out = Multiply.apply(hidden, self.weight, fuse, bool(is_first_microbatch))
        if self.parallel_mode == "row" and self.tp_size > 1:
            how = ScatterSequence if self.sequence_parallel else SumForward
            out = how.apply(out, self.tp_group)
        if self.apply_bias:  # of a row-parallel layer: after the collective
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out


def _default_init(weight: Tensor) -> Tensor:
    """``pytorch/utils.py``, get_default_init_method."""
    return torch.nn.init.normal_(weight, mean=0.0, std=0.023)
