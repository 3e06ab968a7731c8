"""What ``torch.cuda`` answers on a machine without a driver, whatever stands in for the device.

:mod:`megatron_dynmoe.backends.cpu` lets the CPU stand in, and :mod:`megatron_dynmoe.dry_run`
nothing at all.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class Stream:
    """A CUDA stream on a device that runs everything in order, so there is nothing to wait for."""

    device: Any = None
    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Event:
    """A CUDA event that has always happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


def returns(value: Any) -> Callable[..., Any]:
    """Make a function that returns the value.

    Each call makes a new one, because the compiler refuses two names for one function in torch.
    """
    return lambda *args, **kwargs: value


def replace(owner: Any, **ours: Any) -> None:
    """Replace functions of a module or class by ours."""
    for name, value in ours.items():
        setattr(owner, name, value)


def answers(
    *,
    name: str,
    capability: tuple[int, int],
    memory_bytes: int,
    processors: int,
    stream: type[Stream] = Stream,
    event: type[Event] = Event,
) -> dict[str, Any]:
    """Functions and classes for ``torch.cuda``: one device that does everything at once.

    What a device is, and its random numbers, differ: these are not here.
    """
    properties = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        total_memory=memory_bytes,
        multi_processor_count=processors,
    )
    return {
        # devices
        "is_available": returns(True),
        "is_initialized": returns(True),
        "is_current_stream_capturing": returns(False),
        "set_device": returns(None),
        "device": returns(contextlib.nullcontext()),
        "synchronize": returns(None),
        "get_device_properties": returns(properties),
        "get_device_capability": returns(capability),
        "get_device_name": returns(name),
        "_lazy_init": returns(None),
        # streams and events
        "Stream": stream,
        "Event": event,
        "stream": returns(contextlib.nullcontext()),
        "current_stream": lambda *args, **kwargs: stream(),
        "default_stream": lambda *args, **kwargs: stream(),
        "set_stream": returns(None),
        # memory
        "empty_cache": returns(None),
        "memory_allocated": returns(0),
        "max_memory_allocated": returns(0),
        "memory_reserved": returns(0),
        "max_memory_reserved": returns(0),
        "reset_peak_memory_stats": returns(None),
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
        "mem_get_info": returns((memory_bytes, memory_bytes)),
    }
