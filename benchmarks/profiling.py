"""Measures memory and operations of a few calls with PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure

TABLE_ROWS = 30


class PassMemory(NamedTuple):
    """Bytes beyond those that were allocated before."""

    held: int  # between forward and backward pass
    peak: int  # at any time in either


def memory(forward: Callable[[], Any], backward: Callable[[], Any]) -> PassMemory:
    """The memory that PyTorch's allocator hands out in the two passes.

    On the CPU the allocator keeps no account, so this uses the profiler's record.
    """
    if measure.on_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward()
        held = torch.cuda.memory_allocated() - before
        backward()
        torch.cuda.synchronize()
        return PassMemory(held, torch.cuda.max_memory_allocated() - before)
    forward_held, forward_peak = _profiled(forward)
    _, backward_peak = _profiled(backward)
    return PassMemory(forward_held, max(forward_peak, forward_held + backward_peak))


def _profiled(function: Callable[[], Any]) -> tuple[int, int]:
    """Bytes held at the end of a call, and at most, from the allocations within it."""
    with profile(profile_memory=True, activities=activities(), acc_events=True) as profiler:
        function()
    records = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in records if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return held, peak


def operations(function: Callable[[], Any]) -> str:
    """A table of the costliest operations of a call."""
    with profile(activities=activities(), acc_events=True) as profiler:
        function()
        if measure.on_gpu():
            torch.cuda.synchronize()
    return table(profiler)


def table(profiler: profile) -> str:
    """What a profiler recorded, with the costliest operations first."""
    key = "self_device_time_total" if measure.on_gpu() else "self_cpu_time_total"
    return profiler.key_averages().table(
        sort_by=key, row_limit=TABLE_ROWS, max_name_column_width=70
    )


def activities() -> list[ProfilerActivity]:
    """What to profile: the processor, and the GPU if there is one."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if measure.on_gpu() else [])]
