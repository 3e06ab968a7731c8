"""Functions of PyTorch that do not take fake tensors, and ours in their place.

Each says what PyTorch does on a GPU, and counts as that.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_dynmoe.backends.no_driver import replace, returns
from megatron_dynmoe.dry_run.devices import known

if TYPE_CHECKING:
    from megatron_dynmoe.dry_run.recording.recorder import Recorder

_aten = torch.ops.aten
_FUSED_DTYPES = (torch.float16, torch.bfloat16)  # of flash attention


def install(recorder: Recorder) -> None:
    """Replace the functions, before anything imports Megatron."""
    replace(torch, compile=_Compile(recorder), tensor=functools.partial(_tensor, torch.tensor))
    replace(torch.nn.Module, _apply=_apply)
    replace(torch.nn.functional, scaled_dot_product_attention=_attend)
    replace(FakeTensor, tolist=functools.partialmethod(_to_list, recorder), numpy=_to_numpy)
    replace(
        torch.distributed,
        all_gather_object=_all_gather_object,
        broadcast_object_list=returns(None),
    )
    # Without this, optimizers would take one parameter after another.
    for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        types = importlib.import_module(module)._foreach_supported_types
        if FakeTensor not in types:
            types.append(FakeTensor)


class _Compile:
    """``torch.compile``: one kernel, of which only the results take memory."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __call__(self, function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(self, **options)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.recorder.one_kernel(f"compiled {function.__name__}"):
                results = function(*args, **kwargs)
            self.recorder.keep(results)
            return results

        return run


def _tensor(original: Any, data: Any, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.tensor``, which reads tensors in a list one by one, and pins memory by a driver."""

    def read(part: Any) -> Any:
        if isinstance(part, list | tuple):
            return [read(each) for each in part]
        return part.item() if isinstance(part, Tensor) else part

    kwargs.pop("pin_memory", None)
    return original(read(data) if isinstance(data, list | tuple) else data, *args, **kwargs)


def _apply(self: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """``Module._apply``, which changes what is in a parameter; this changes the parameter."""
    for module in self.children():
        module._apply(function)
    for name, old in self._parameters.items():
        if old is None:
            continue
        with torch.no_grad():
            new = function(old)
        if new is not old:
            parameter = torch.nn.Parameter(new, old.requires_grad)
            marks = {key: value for key, value in vars(old).items() if key not in vars(parameter)}
            vars(parameter).update(marks)
            self._parameters[name] = parameter
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention``, which asks the device which of its kernels to run."""
    if query.dtype in _FUSED_DTYPES and attn_mask is None:
        return _aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if enable_gqa:  # the other kernel takes as many keys as queries
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


def _to_list(self: Tensor, recorder: Recorder) -> Any:
    """``Tensor.tolist``, which copies all values at once."""
    if known.is_on_device(self):
        recorder.wait("tolist")
    value = known.value_of(self)
    if value is not None:
        with _disable_current_modes():
            return value.tolist()
    values: Any = known.number_in(self)
    for size in reversed(self.shape):
        values = [values] * size
    return values


def _to_numpy(self: Tensor, **_: object) -> Any:
    value = known.value_of(self)
    if value is None:
        raise ValueError("an array is read whose values a dry run does not know")
    with _disable_current_modes():
        return value.numpy()


def _all_gather_object(gathered: list[Any], thing: Any, group: object = None) -> None:
    """As if every rank had sent the same."""
    gathered[:] = [thing] * len(gathered)
