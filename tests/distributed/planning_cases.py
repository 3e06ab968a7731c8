"""Hooks of cases that measure what a training allocates; each is given the worker's Recorder."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from megatron.training import training

from megatron_dynmoe.kernels import routing_cpu
from tests.distributed.faults import replaced


@contextlib.contextmanager
def measure_state(recorder: Any) -> Iterator[None]:
    """``state``: bytes of weights, gradients and optimizer state on this rank, after training."""
    yield
    buffers = [
        buffer
        for chunk in recorder.model
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    recorder.result["state"] = {
        "parameters": sum(p.numel() for chunk in recorder.model for p in chunk.parameters()),
        "weights": sum(p.nbytes for chunk in recorder.model for p in chunk.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(_optimizer_bytes(part) for part in recorder.optimizer.chained_optimizers),
    }


@contextlib.contextmanager
def measure_peak(recorder: Any) -> Iterator[None]:
    """``peak``: the most bytes allocated within a step on top of what was there before it."""
    train_step = training.train_step

    def measured_step(*args, **kwargs):
        gc.collect()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            outcome = train_step(*args, **kwargs)
        recorder.result["peak"] = peak_bytes(profiler)
        return outcome

    with replaced(training, "train_step", measured_step):
        yield


@contextlib.contextmanager
def all_to_the_first_experts(recorder: Any) -> Iterator[None]:
    """Every token uses as many experts as the cap allows, and those that the first rank holds."""

    def select_and_count(probs_TE, threshold, max_experts):
        chosen_TE = torch.zeros_like(probs_TE)
        chosen_TE[:, :max_experts] = 1
        return chosen_TE, torch.full((len(probs_TE),), max_experts)

    with replaced(routing_cpu, "_select_and_count", select_and_count):
        yield


def peak_bytes(profiler: torch.profiler.profile) -> int:
    """The most bytes that were allocated at once since the profiler started."""
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event for event in events if event.name() == "[memory]"]
    allocated = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        allocated += change.nbytes()
        peak = max(peak, allocated)
    return peak


def _optimizer_bytes(optimizer: Any) -> int:
    """Of moments and of main parameters that are not the model's own."""
    states = [state for state in optimizer.optimizer.state.values()]
    moments = sum(
        value.nbytes for state in states for name, value in state.items() if name != "step"
    )
    groups = getattr(optimizer, "shard_fp32_from_float16_groups", None)
    groups = groups or getattr(optimizer, "fp32_from_float16_groups", [])
    return moments + sum(main.nbytes for group in groups for main in group)
