"""``pytorch/optimizers/`` and ``common/multi_tensor/``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..not_stood_for import refuse


class MultiTensorApply:
    """``multi_tensor_apply.py``: drop empty tensors, call; None if none is left."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(
        self, op: Callable[..., Any], noop_flag: Tensor, lists: list[list[Tensor]], *args: Any
    ) -> Any:
        """Call ``op`` with lists of equal length."""
        if any(len(tensors) != len(lists[0]) for tensors in lists):
            raise RuntimeError("Expected aligned multi-tensor lists.")
        keep = [tensor.numel() > 0 for tensor in lists[0]]
        for i, tensors in enumerate(lists):
            lists[i] = [tensor for tensor, kept in zip(tensors, keep, strict=True) if kept]
        return op(self.chunk_size, noop_flag, lists, *args) if lists[0] else None


multi_tensor_applier = MultiTensorApply(2048 * 32)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """``l2norm.cu``: the norm of all tensors, [1] float32 on the device, and those of each."""
    _check_contiguous(lists)
    each = torch.stack([tensor.float().square().sum() for tensor in lists[0]])
    return each.sum().sqrt().view(1), each.sqrt() if per_tensor else each.new_empty(0)


def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], scale: float
) -> None:
    """``scale.cu``: the second list becomes the first times a number."""
    _check_contiguous(lists)
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


def multi_tensor_scale_tensor(
    chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], scale: Tensor
) -> None:
    """``scale.cu``: as :func:`multi_tensor_scale`, by a float32 tensor on the device."""
    assert scale.dtype == torch.float32 and scale.numel() == 1
    multi_tensor_scale(chunk_size, noop_flag, lists, scale)  # type: ignore[arg-type]


def _check_contiguous(lists: list[list[Tensor]]) -> None:
    assert all(tensor.is_contiguous() for tensors in lists for tensor in tensors)


class FusedAdam(torch.optim.Optimizer):
    """``fused_adam.py`` with float32 states, and ``adam.cu``.

    Unlike torch's AdamW it counts steps in each parameter group (``step``, a number), not in the
    state of each parameter; a group without parameters does not count.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        states = {master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype}
        refuse(
            capturable=capturable,
            master_weights=master_weights,
            low_precision_states=states != {torch.float32},
            use_decoupled_grad=use_decoupled_grad,
        )
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas}
        super().__init__(params, {**defaults, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode
        self.master_weights = master_weights
        self.capturable = capturable
        self.name_to_dtype_map = dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.float32)

    def initialize_state(self, param: Tensor, store_param_remainders: bool = False) -> None:
        """Zeros of float32 for both moments."""
        for name in self.name_to_dtype_map:
            self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        """A state in float32; KeyError for a name that is no state of this optimizer."""
        assert self.state[param][state_name].dtype == self.name_to_dtype_map[state_name]
        return self.state[param][state_name]

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Copy a state that was saved; KeyError for a name that is no state of this optimizer."""
        state = self.state[param]
        if state_name not in state:
            dtype = self.name_to_dtype_map[state_name]
            state[state_name] = torch.empty_like(param, dtype=dtype)
        state[state_name].copy_(unscaled_state)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with states in float32."""
        state_dict = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                names = state_dict["state"][number]
                state_dict["state"][number] = {
                    name: self.get_unscaled_state(parameter, name) for name in names
                }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, then each state by :meth:`set_scaled_state`."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = {}
                for name, value in state_dict["state"][number].items():
                    if value is not None:
                        self.set_scaled_state(parameter, name, value.float())

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        """One step of each group that has parameters."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param)
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        corrected = group["bias_correction"]
        correction1 = 1 - beta1 ** group["step"] if corrected else 1.0
        correction2 = 1 - beta2 ** group["step"] if corrected else 1.0
        p, g = param.float(), param.grad.float()
        if not self.adam_w_mode:
            g = g + group["weight_decay"] * p
        m, v = self.state[param]["exp_avg"], self.state[param]["exp_avg_sq"]
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        update = (m / correction1) / ((v / correction2).sqrt() + group["eps"])
        if self.adam_w_mode:
            update = update + group["weight_decay"] * p
        param.copy_(p - group["lr"] * update)


class FusedSGD(torch.optim.SGD):
    """``fused_sgd.py`` without master gradients, which is torch's SGD."""
