"""What Megatron computes in few kernels only with Apex or Transformer Engine.

Without these, its optimizer works through one parameter after another: several kernels each, and
for the norm a wait of the host. The functions here take all parameters at once. Rotary positions
get a Triton kernel of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dynmoe import kernels
from megatron_dynmoe.backends import cpu
from megatron_dynmoe.upstream.optimizer_state import is_torch_adam


def l2_norm(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """The norm of all elements of a list of tensors; arguments as of ``amp_C.multi_tensor_l2norm``.

    Returns:
        [1] float32, on the tensors' device, and no norms of single tensors.
    """
    norms = torch._foreach_norm(tensor_lists[0])
    return torch.stack(norms).norm().float().reshape(1), None


def scale(chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], by: float) -> None:
    """Multiply a list of tensors, in place; arguments as of ``amp_C.multi_tensor_scale``.

    Raises:
        ValueError: the results are to be written to other tensors than those that are read.
    """
    sources, targets = tensor_lists
    if any(source is not target for source, target in zip(sources, targets, strict=True)):
        raise ValueError("multi_tensor_scale reads and writes different tensors.")
    torch._foreach_mul_(targets, by)


def with_fused_adam(build: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch's Adam, which upstream builds, take each step of all parameters in a few kernels.

    It then needs no temporaries, which otherwise are as large as the parameters that it updates. On
    a CPU it takes a fifth of the time, and rounds the last bit in another way than PyTorch's loop,
    which ``DYNMOE_KERNELS=0`` leaves in place there.
    """

    @functools.wraps(build)
    def build_fused(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        optimizer = getattr(built, "optimizer", built)
        as_it_is = cpu.is_installed() and kernels.asked_for() == "0"
        if is_torch_adam(optimizer) and not as_it_is:
            for settings in (optimizer.defaults, *optimizer.param_groups):
                settings["fused"] = True
        return built

    return build_fused


def keep_fused(optimizer: torch.optim.Optimizer) -> None:
    """Step as before a state was loaded, whatever the run that saved it did.

    A fused Adam counts steps on the device, any other one on the CPU.
    """
    is_fused = optimizer.defaults["fused"]
    for group in optimizer.param_groups:
        group["fused"] = is_fused
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            if "step" in state:
                state["step"] = state["step"].to(param.device if is_fused else "cpu")


def no_step(optimizer: torch.optim.Optimizer, param: Tensor) -> Tensor:
    """The number of steps of a parameter that has made none."""
    return torch.zeros((), device=param.device if optimizer.defaults["fused"] else "cpu")


def rotation(found: Callable[..., Any] | None) -> Callable[..., Any]:
    """Let upstream rotate queries and keys by our kernel, if it has found no kernel of its own."""
    from megatron_dynmoe.kernels.rope import rotate

    return found or rotate


def packed_rotation(found: Callable[..., Any] | None) -> Callable[..., Any]:
    """Rotate sequences that are packed without a batch dimension as without a kernel."""
    from megatron.core.models.common.embeddings import rope_utils

    def rotate_packed(
        values: Tensor, ends: Tensor, angles: Tensor, *, interleaved: bool, **_: int
    ) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        return rope_utils._apply_rotary_pos_emb_thd(
            values, ends, angles, interleaved, cp_group=group
        )

    return found or rotate_packed
