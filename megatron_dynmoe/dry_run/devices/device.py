"""A CUDA device that does not exist, for fake tensors: what ``torch.cuda`` and autograd answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses import fake_tensor

from megatron_dynmoe.backends.no_driver import Event, Stream, answers, replace, returns
from megatron_dynmoe.dry_run.devices import shim

DEVICE = torch.device("cuda", 0)
_engine: Any = torch.autograd.Variable._execution_engine


def install(
    name: str, capability: tuple[int, int], memory_bytes: int, on_wait: Callable[[str], None]
) -> None:
    """Let ``torch.cuda`` answer for a device. Call before anything imports Megatron.

    Args:
        on_wait: is told whenever the host waits for the device, and by which call.
    """

    class WaitingEvent(Event):
        def synchronize(self) -> None:
            on_wait("Event.synchronize")

    class WaitingStream(Stream):
        device = DEVICE

        def record_event(self, event: Any = None) -> Any:
            return event or WaitingEvent()

        def synchronize(self) -> None:
            on_wait("Stream.synchronize")

    random_state = torch.zeros(16, dtype=torch.uint8)  # nothing is drawn
    ours: dict[str, Any] = {
        "device_count": returns(1),
        "current_device": returns(DEVICE.index),
        "_lazy_call": returns(None),
        "synchronize": lambda *_: on_wait("torch.cuda.synchronize"),
        "get_rng_state": returns(random_state),
        "set_rng_state": returns(None),
        "manual_seed": returns(None),
        "manual_seed_all": returns(None),
    }
    machine = answers(
        name=name,
        capability=capability,
        memory_bytes=memory_bytes,
        processors=1,
        stream=WaitingStream,
        event=WaitingEvent,
    )
    replace(torch.cuda, **machine | ours)
    replace(torch.cuda.random, get_rng_state=torch.cuda.get_rng_state)
    replace(torch.cuda.nvtx, range_push=returns(None), range_pop=returns(None))
    replace(torch.Tensor, cuda=_to_device, pin_memory=_same, record_stream=returns(None))
    replace(fake_tensor, init_gpu_context=returns(None))
    replace(fake_tensor.FakeTensorMode, avoid_device_init=property(returns(True)))
    replace(torch.autograd.Variable, _execution_engine=_Engine())


def _same(tensor: torch.Tensor, *_: object) -> torch.Tensor:
    return tensor


def _to_device(
    tensor: torch.Tensor, device: object = None, non_blocking: bool = False, **_: object
) -> torch.Tensor:
    return tensor.to(DEVICE, non_blocking=non_blocking)


class _Engine:
    """Autograd's engine, for devices that do not exist."""

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        return run_backward_here(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(_engine, name)


def run_backward_here(*args: Any, **kwargs: Any) -> Any:
    """Run the engine in this thread: others would count the operations of their graphs anew."""
    with shim.devices_counted(), torch.autograd.set_multithreading_enabled(False):
        return _engine.run_backward(*args, **kwargs)
