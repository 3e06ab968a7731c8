"""Room for the rows of a layer without a wait for their number: ``row_buffer`` target.

A controller holds the mean number of experts per token, so a layer uses about as many rows in one
global batch as in the one before. :class:`RowBuffer` makes room for ``(1 + margin) * mean * T``
rows of a micro-batch of T tokens, with the layer's own mean over the global batch before.

1. *Before* a global batch, every dispatcher is told its room. It then never asks the device for
   the number of rows. In a process's first global batch nothing is known, and rows are counted.
2. *During* it, a dispatcher leaves out the tokens that do not fit, so that nothing is written
   beyond the buffer, and notes on the device that it has.
3. *After* it, the notes of all ranks have been summed with the counts, and the host reads them,
   once for all layers. If there is one, all ranks run the global batch again, with counted rows,
   before the optimizer steps. So no result of a run depends on the room, not in one bit.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.utils import get_model_config, log_single_rank

from megatron_dynmoe.control.update import GlobalBatchUpdate
from megatron_dynmoe.moe.layer import DynMoELayer

if TYPE_CHECKING:
    from megatron_dynmoe.routing.counters import RoutingStatistics

logger = logging.getLogger(__name__)


class RowBuffer:
    """One of Megatron's schedules (``forward_backward_func``), run again if a buffer overflows.

    Without a margin, and in evaluations, it is the schedule itself.

    Attributes:
        steps: global batches that have been trained on.
        repeated: how many of them have been run again.
    """

    def __init__(self, schedule: Callable[..., Any]) -> None:
        self.schedule = schedule
        self.steps = self.repeated = 0
        self._means_L: list[float] = []

    def __call__(
        self, *, model: Any, data_iterator: Any, forward_only: bool = False, **given: Any
    ) -> Any:
        """Run a global batch; arguments and result are those of upstream's schedules."""
        run = functools.partial(self.schedule, model=model, forward_only=forward_only, **given)
        chunks = model if isinstance(model, list) else [model]
        # A wrapper may stand around the update.
        update = inspect.unwrap(get_model_config(chunks[0]).finalize_model_grads_func)
        margin = update.dynmoe.row_buffer_margin if isinstance(update, GlobalBatchUpdate) else None
        if margin is None or forward_only:  # an evaluation counts its rows
            return run(data_iterator=data_iterator)
        batches, again = _tee_batches(data_iterator)
        restore = _state_of_host()
        self._make_room(chunks, 1 + margin)
        losses = run(data_iterator=batches)
        for layer in _layers(chunks):
            layer.token_dispatcher.count_rows()
        self.steps += 1
        full = self._read(update)
        if full:
            self.repeated += 1
            restore()
            get_moe_metrics_tracker().clear()
            for chunk in chunks:
                chunk.zero_grad_buffer()
                chunk.zero_grad()  # what lies in no buffer
            losses = run(data_iterator=again)
            self._read(update)
            self._tell(full, margin)
        return losses

    def _make_room(self, chunks: list[torch.nn.Module], times: float) -> None:
        for layer in _layers(chunks):
            mean = self._means_L[layer.layer_number - 1] if self._means_L else 0.0
            if mean > 0:  # it is NaN if no token was counted
                most = layer.router.rule.cap(training=True) or layer.router.num_experts
                rows_per_token = min(times * mean, most)
                layer.token_dispatcher.make_room(rows_per_token, layer.router.counters)

    def _read(self, update: GlobalBatchUpdate) -> list[int]:
        """Keep the means, and return the numbers of the layers whose buffer overflowed."""
        assert update.statistics is not None
        overflows_L, self._means_L = read(update.statistics)
        return [number for number, overflows in enumerate(overflows_L, 1) if overflows]

    def _tell(self, full: list[int], margin: float) -> None:
        layers = f"layer{'s' if len(full) > 1 else ''} {', '.join(map(str, full))}"
        log_single_rank(
            logger,
            logging.WARNING,
            f"more rows than room in {layers}: the step was run again with counted rows, as "
            f"{self.repeated} of {self.steps} steps of this process (row_buffer_margin is "
            f"{margin:g})",
        )


def with_row_buffer(get_schedule: Callable[..., Any]) -> Callable[..., RowBuffer]:
    """Wrap upstream's ``get_forward_backward_func``."""

    @functools.wraps(get_schedule)
    def get_schedule_with_row_buffer(*args: Any, **kwargs: Any) -> RowBuffer:
        return RowBuffer(get_schedule(*args, **kwargs))

    return get_schedule_with_row_buffer


def read(statistics: RoutingStatistics) -> tuple[list[float], list[float]]:
    """Wait for the numbers of overflows and the means of all layers, [L] each."""
    overflows_L, means_L = torch.stack([statistics.overflows, statistics.mean_experts]).tolist()
    return overflows_L, means_L


def _layers(chunks: list[torch.nn.Module]) -> Iterator[DynMoELayer]:
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, DynMoELayer))


def _tee_batches(data_iterator: Any) -> tuple[Any, Any]:
    """The same micro-batches two times; each is kept until both have given it, or are deleted."""
    if isinstance(data_iterator, list):  # of the chunks of a pipeline with virtual stages
        pairs = [_tee_batches(each) for each in data_iterator]
        return [first for first, _ in pairs], [second for _, second in pairs]
    if data_iterator is None:  # this rank gets its batches from another
        return None, None
    first, second = itertools.tee(_each(data_iterator))
    return map(copy.copy, first), map(copy.copy, second)


def _each(data_iterator: Any) -> Iterator[Any]:
    while True:  # upstream's iterators have no __iter__
        yield next(data_iterator)


def _state_of_host() -> Callable[[], None]:
    """Remember what a pass changes beside counters and gradients; the result brings it back.

    That is the state of all generators of random numbers, and what upstream's checks of the loss
    have found: they run in an overflowed pass, too, whose losses mean nothing.
    """
    machine = get_rerun_state_machine()
    machine._save_state()
    kept = {name: copy.copy(value) for name, value in vars(machine).items()}

    def restore() -> None:
        vars(machine).update(kept)
        machine._restore_state()

    return restore
