"""Profiles a training step: its costliest operations, and the shares of routing and controller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile, record_function

from benchmarks import measure
from benchmarks.profiling import activities, table
from benchmarks.training import Provider, step

ROUTING, CONTROL, FINALIZE = (f"dynmoe {name}" for name in ("routing", "control", "finalize"))
_BACKWARD = "autograd::engine::evaluate_function"


class StepProfile(NamedTuple):
    """Shares of one step's time: processor time on a CPU, the time of kernels on a GPU.

    Attributes:
        routing: the share that routers take after their gate, forward and backward: normalize,
            select, weigh, losses, counts.
        control: the share for adding up the counts of the batch and moving the threshold. Both are
            None for a reference.
        table: the costliest operations.
    """

    routing: float | None
    control: float | None
    table: str


def profiled_step(provider: Any) -> StepProfile:
    """Run one training step under PyTorch's profiler."""
    made_while_routing: set[int] = set()
    is_ours = isinstance(provider, Provider)
    with (
        _marked(provider, made_while_routing) if is_ours else nullcontext(),
        profile(activities=activities(), acc_events=True) as profiler,
    ):
        step(provider)
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CPU]
    total = sum(_own_time(event) for event in events)
    if not is_ours:
        return StepProfile(None, None, table(profiler))
    by_name = {name: _total(events, name) for name in (ROUTING, CONTROL, FINALIZE)}
    backward = sum(
        _time(event)
        for event in events
        if event.name.startswith(_BACKWARD) and event.sequence_nr in made_while_routing
    )
    return StepProfile(
        (by_name[ROUTING] + backward) / total,
        (by_name[CONTROL] - by_name[FINALIZE]) / total,
        table(profiler),
    )


@contextmanager
def _marked(provider: Provider, made_while_routing: set[int]) -> Iterator[None]:
    """Give routing and control names of their own in the profile.

    Args:
        made_while_routing: receives the numbers of the autograd nodes that routing creates.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_dynmoe.control.update import GlobalBatchUpdate

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            first = torch._C._autograd._get_sequence_nr()
            with record_function(name):
                result = function(*args, **kwargs)
            if name == ROUTING:
                made_while_routing.update(range(first, torch._C._autograd._get_sequence_nr()))
            return result

        return wrapper

    with ExitStack() as stack:
        for chunk in provider.model:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    stack.enter_context(_replaced(module, "routing", ROUTING, named))
        update = provider.config.finalize_model_grads_func
        if isinstance(update, GlobalBatchUpdate):
            stack.enter_context(_replaced(update, "finalize", FINALIZE, named))
            for method in ("__call__", "_commit"):
                stack.enter_context(_replaced(GlobalBatchUpdate, method, CONTROL, named))
        yield


def _replaced(owner: Any, attribute: str, name: str, named: Callable[..., Any]) -> Any:
    return mock.patch.object(owner, attribute, named(name, getattr(owner, attribute)))


def _total(events: list[FunctionEvent], name: str) -> float:
    return sum(_time(event) for event in events if event.name == name)


def _time(event: FunctionEvent) -> float:
    return event.device_time_total if measure.on_gpu() else event.cpu_time_total


def _own_time(event: FunctionEvent) -> float:
    return event.self_device_time_total if measure.on_gpu() else event.self_cpu_time_total
