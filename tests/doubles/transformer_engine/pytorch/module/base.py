"""``pytorch/module/base.py``: what all modules with weights share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...not_stood_for import NotStoodFor
from ..device import stands_for_cuda

# Weights in low precision, and GEMMs that overlap with communication, are left out.
_dummies: dict[tuple[Any, ...], Tensor] = {}


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """One shared tensor per shape for weights whose gradient is elsewhere; arbitrary content."""
    key = (*shape, dtype)
    if key not in _dummies:
        device = torch.cuda.current_device()
        _dummies[key] = torch.full(shape, torch.nan, dtype=dtype, device=device)
    if zero:
        _dummies[key].fill_(0)
    return _dummies[key].detach()


def group_size(group: Any) -> int:
    """``pytorch/distributed.py``, get_distributed_world_size."""
    return torch.distributed.get_world_size(group) if torch.distributed.is_initialized() else 1


class TransformerEngineBaseModule(torch.nn.Module):
    """``TransformerEngineBaseModule``."""

    def __init__(self) -> None:
        super().__init__()
        if not torch.cuda.is_available():
            raise RuntimeError("TransformerEngine needs CUDA.")
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.activation_dtype: torch.dtype | None = None
        self.save_original_input = False
        self.tp_group: Any = None
        self.tp_size = 1
        self._init_functions: dict[str, tuple[Callable[[Tensor], Any], Any]] = {}

    def set_up_tensor_parallel(self, tp_group: Any, tp_size: int, sequence_parallel: bool) -> None:
        """The same lines in the constructor of each module with a tensor-parallel group."""
        self.tp_group = tp_group
        self.tp_size = tp_size if tp_group is None else group_size(tp_group)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel

    def add_parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        init: Callable[[Tensor], Any],
        tracker: Callable[[], Any] | None = None,
        **where: Any,
    ) -> None:
        """``register_parameter``: with it comes how ``reset_parameters`` draws its values."""
        self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, **where)))
        self._init_functions[name] = (init, tracker)

    def reset_parameters(self) -> None:
        """Draw all values: in a fork of the tracker's generator if there is a tracker.

        Constants are no draw, and norms and biases are registered without a tracker.
        """
        for name, parameter in self.named_parameters(recurse=False):
            init, tracker = self._init_functions[name]
            values = parameter.detach()
            if tracker is None:
                init(values)
                continue
            fork_name = getattr(self, "rng_tracker_name", None)
            with tracker().fork(fork_name) if fork_name else tracker().fork():
                init(values)

    def get_extra_state(self) -> Tensor:
        """An empty byte tensor: the state of low precision, which is off."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Load such a state. None (of an old checkpoint) and an empty one are nothing to load."""
        if state is None or (isinstance(state, Tensor) and state.numel() == 0):
            return
        raise NotStoodFor("an extra state of FP8")

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Low precision is off, so there is none."""

    def prepare_forward(self, inp: Tensor) -> Tensor:
        """Check device and dtype of an input, and make it contiguous."""
        if not stands_for_cuda(inp):
            raise RuntimeError(f"TransformerEngine needs CUDA. Got input on device: {inp.device}")
        if self.activation_dtype != inp.dtype:
            for name, parameter in self.named_parameters():
                if inp.dtype != parameter.dtype:
                    raise TypeError(
                        "Data types for parameters must match when outside of autocasted region. "
                        f"Found input dtype: {inp.dtype} and {name!r} dtype: {parameter.dtype}"
                    )
            self.activation_dtype = inp.dtype
        return inp.contiguous()

    def backward_dw(self) -> None:
        """Nothing is left to do without ``delay_wgrad_compute``, which is not stood for."""


def mark_partitioned(parameter: Tensor, dim: int) -> None:
    """``pytorch/distributed.py``, set_tensor_model_parallel_attributes."""
    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, name):
            raise RuntimeError(f"Tensor already has attribute '{name}' set.")
    parameter.tensor_model_parallel = True
    parameter.partition_dim, parameter.partition_stride = dim, 1
