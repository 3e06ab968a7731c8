"""Small replacements for functions of Megatron and PyTorch that belong to no other room.

The table in :mod:`.patches` says why each is needed.
"""

from __future__ import annotations

import functools
import multiprocessing
import queue
from collections.abc import Callable
from typing import Any

import torch


def with_plain_queue(save: Callable[..., Any]) -> Callable[..., Any]:
    """Let a save that is not asynchronous pass its results through a queue of this process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    @functools.wraps(save)
    def save_with_plain_queue(self, *args, **kwargs):
        kept, filesystem_async._results_queue = filesystem_async._results_queue, queue.Queue()
        try:
            return save(self, *args, **kwargs)
        finally:
            filesystem_async._results_queue = kept

    return save_with_plain_queue


def noting_parent_at_start(watchdog: type) -> type:
    """Note the parent of a data worker when it starts, and not when it first checks on it."""

    class Watchdog(watchdog):
        def __init__(self) -> None:
            super().__init__()
            parent = multiprocessing.parent_process()
            if parent is not None and parent.pid is not None:
                self.manager_pid = parent.pid

    return Watchdog


def with_first_interval_logged(log: Callable[..., Any]) -> Callable[..., Any]:
    """Log the first step as any other if it ends an interval."""
    from megatron.training import get_args

    @functools.wraps(log)
    def log_interval(*args, is_first_iteration=False, **kwargs):
        iteration = kwargs.get("iteration", args[3] if len(args) > 3 else 0)
        ends_interval = iteration % get_args().log_interval == 0
        return log(*args, is_first_iteration=is_first_iteration and not ends_interval, **kwargs)

    return log_interval


def seeded_by_rank(init: Callable[..., None]) -> Callable[..., None]:
    """Draw the experts of a rank by a seed that includes the rank.

    A run with one expert-parallel rank draws as upstream does.
    """
    from megatron.core import parallel_state

    @functools.wraps(init)
    def init_by_rank(self, *args, **kwargs):
        num_ranks = parallel_state.get_expert_model_parallel_world_size()
        by_rank = kwargs.get("is_expert") and kwargs["config"].use_cpu_initialization
        if not by_rank or num_ranks == 1:
            return init(self, *args, **kwargs)
        generator = torch.default_generator
        # All ranks draw this number, so they go on alike with what is not an expert.
        seed = int(torch.randint(2**48, (), generator=generator))
        state = generator.get_state()
        generator.manual_seed(seed + parallel_state.get_expert_model_parallel_rank())
        try:
            return init(self, *args, **kwargs)
        finally:
            generator.set_state(state)

    return init_by_rank


def counting_all_sinks(param_groups: Callable[..., Any]) -> Callable[..., Any]:
    """Say of attention's learnable sinks that tensor parallelism splits them by heads.

    Before the optimizer copies the parameters, which takes such attributes along.
    """

    @functools.wraps(param_groups)
    def param_groups_with_sinks(model_chunks, *args, **kwargs):
        for chunk in model_chunks:
            for name, parameter in chunk.named_parameters():
                if name.endswith("softmax_offset"):
                    parameter.tensor_model_parallel = True
                    parameter.partition_dim, parameter.partition_stride = 0, 1
        return param_groups(model_chunks, *args, **kwargs)

    return param_groups_with_sinks


def decaying_by_what_was_loaded(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Set learning rates and weight decay once more when all of the saved schedule is known."""

    @functools.wraps(load_state_dict)
    def load_then_set(self, state_dict):
        load_state_dict(self, state_dict)
        self.step(increment=0)

    return load_then_set
