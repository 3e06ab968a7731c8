"""Hooks of cases: faults to inject, and probes. Each is given the worker's Recorder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer.optimizer import FP32Optimizer, MixedPrecisionOptimizer
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.training import training

from megatron_dynmoe.control.update import GlobalBatchUpdate, routers_of
from megatron_dynmoe.moe.dispatch import VariableKAlltoAllTokenDispatcher
from megatron_dynmoe.moe.router import DynamicRouter

SYNCS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def second_step_is_skipped(recorder: Any) -> Iterator[None]:
    """The optimizer finds an infinity in the gradients of the second step."""
    with contextlib.ExitStack() as stack:
        for cls in (FP32Optimizer, MixedPrecisionOptimizer):  # the latter if it is distributed

            def prepare_grads(optimizer, prepare=cls.prepare_grads):
                found_inf = prepare(optimizer)
                return found_inf or len(recorder.result["steps"]) == 1

            stack.enter_context(replaced(cls, "prepare_grads", prepare_grads))
        yield


@contextlib.contextmanager
def every_step_runs_twice(recorder: Any) -> Iterator[None]:
    """Upstream's rerun machine reports how reproducible a step is.

    Its flag, ``--rerun-mode report_stats``, is not a value of its own enumeration in Megatron 0.19.
    """
    train_step = training.train_step

    def in_that_mode(*args, **kwargs):
        get_rerun_state_machine().set_mode(RerunMode.REPORT_DETERMINISM_STATS)
        return train_step(*args, **kwargs)

    with replaced(training, "train_step", in_that_mode):
        yield


@contextlib.contextmanager
def first_run_of_a_step_is_wrong(recorder: Any) -> Iterator[None]:
    """Every odd call of the update sees counts that are far too high."""
    update, calls = GlobalBatchUpdate.__call__, []

    def wrong_at_first(self, model, *args, **kwargs):
        calls.append(None)
        if len(calls) % 2 == 1:
            for router in routers_of(model):
                router.counters.sums.assignments.add_(1000)
        update(self, model, *args, **kwargs)

    with replaced(GlobalBatchUpdate, "__call__", wrong_at_first):
        yield


@contextlib.contextmanager
def count_syncs_and_reductions(recorder: Any) -> Iterator[None]:
    """``update``: all-reduces and host syncs of the update alone, a pair each global batch.

    ``routing_syncs``: host syncs in all calls of the router.
    """
    counted = recorder.result
    counted.update(update=[], routing_syncs=0, syncs=[])
    found = {"reductions": 0, "syncs": 0}
    update, routing = GlobalBatchUpdate.__call__, DynamicRouter.routing
    all_reduce = torch.distributed.all_reduce

    def counting(name, function):
        def called(*args, **kwargs):
            found[name] += 1
            return function(*args, **kwargs)

        return called

    def counted_update(self, *args, **kwargs):
        finalize, total = self.finalize, {}

        def upstreams(*inner_args, **inner_kwargs):
            finalize(*inner_args, **inner_kwargs)
            total.update(found)  # what upstream did is not ours

        total.update(found)
        with replaced(self, "finalize", upstreams):
            update(self, *args, **kwargs)
        counted["update"].append([found[name] - total[name] for name in ("reductions", "syncs")])

    def counted_routing(self, *args, **kwargs):
        before = found["syncs"]
        outcome = routing(self, *args, **kwargs)
        counted["routing_syncs"] += found["syncs"] - before
        return outcome

    with contextlib.ExitStack() as stack:
        for name in SYNCS:
            original = getattr(torch.Tensor, name)
            stack.enter_context(replaced(torch.Tensor, name, counting("syncs", original)))
        reduce = counting("reductions", all_reduce)
        stack.enter_context(replaced(torch.distributed, "all_reduce", reduce))
        stack.enter_context(replaced(GlobalBatchUpdate, "__call__", counted_update))
        stack.enter_context(replaced(DynamicRouter, "routing", counted_routing))
        # On a CPU nothing has to be synchronized, and NumPy sorts: count what a device would run.
        stack.enter_context(mock.patch.dict(os.environ, DYNMOE_KERNELS="0"))
        yield


@contextlib.contextmanager
def gathered_elements(recorder: Any) -> Iterator[None]:
    """``gathered``: elements of parameters that this rank gathers, by step."""
    gather = param_and_grad_buffer.dist_all_gather_func
    gathered = recorder.result["gathered"] = {}

    def counted(output, *args, **kwargs):
        step = len(recorder.result["steps"])
        gathered[step] = gathered.get(step, 0) + output.numel()
        return gather(output, *args, **kwargs)

    with replaced(param_and_grad_buffer, "dist_all_gather_func", counted):
        yield


@contextlib.contextmanager
def tokens_of_each_expert(recorder: Any) -> Iterator[None]:
    """Record what each dispatch of a training step sends: layer's dispatcher, tokens per expert."""
    preprocess = VariableKAlltoAllTokenDispatcher.preprocess
    sent = recorder.result["sent"] = []
    order: dict[int, int] = {}  # of the layers, as the first micro-batch meets them

    def recorded(dispatcher, routing_map):
        if torch.is_grad_enabled():
            layer = order.setdefault(id(dispatcher), len(order))
            sent.append((layer, routing_map.sum(dim=0).tolist()))
        return preprocess(dispatcher, routing_map)

    with replaced(VariableKAlltoAllTokenDispatcher, "preprocess", recorded):
        yield
