"""Which micro-batches of a step run, and which moment each operation belongs to.

Of many micro-batches all but the first and the last of the pipeline's schedule cost the same. So a
few are run, and one of the middle stands for those that are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_dynmoe.dry_run.recording.recorder import Moment, Recorder


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of one step.

    Attributes:
        planned: as many as the command line says.
        run: as many as the dry run runs.
        group: as many as go through the pipeline together; more than 1 with virtual stages.
        middle: the first micro-batch of the group that stands for those that are not run.
    """

    planned: int
    run: int
    group: int
    middle: int

    @classmethod
    def of(cls, planned: int, pipeline: int, stage: int, chunks: int) -> MicroBatches:
        """Choose those that run.

        Args:
            planned: micro-batches of a step.
            pipeline, stage, chunks: the pipeline's size, this rank in it, and its virtual stages.
        """
        ahead = pipeline - stage - 1
        group = pipeline if chunks > 1 else 1
        # Passes before the first backward pass, in groups.
        passes = 2 * ahead + (chunks - 1) * pipeline if chunks > 1 else ahead
        warm_up = -(-passes // (group * chunks))
        run = min(planned, group * (2 * warm_up + 3))
        return cls(planned, run, group, group * (warm_up + 1))

    def in_sample(self, moment: Moment) -> bool:
        """Whether something happens in the group of the middle; if there are few, in the first."""
        first = self.middle if self.middle + self.group < self.run else 0
        return first <= moment.micro_batch < first + self.group

    def times(self, moment: Moment) -> float:
        """How often something of the step happens for each time that it was seen."""
        return 1 + (self.planned - self.run) / self.group * self.in_sample(moment)


class Watch:
    """Tells a recorder the moment, at Megatron's own functions.

    Attributes:
        steps: number of the step that runs, from 1; 0 before the first one.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.steps = 0

    def phase(self, name: str) -> str:
        """The name of a phase in the current step. Only that of the last step is the plain one."""
        return name if self.steps == NUM_STEPS else f"{name} of step {self.steps}"

    def begin_step(self) -> None:
        """Begin a step. What runs between the last one and this one belongs to this one."""
        if not self.steps:
            self.steps = 1
            self.recorder.enter(Moment(self.phase(BETWEEN)))

    def end_step(self) -> None:
        """End a step."""
        self.recorder.places.forget_nodes()
        self.recorder.state_bytes = self.recorder.memory.num_bytes
        self.steps += 1
        self.recorder.enter(Moment(self.phase(BETWEEN)))

    def during(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Wrap a function that is a phase of its own."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.recorder.during(Moment(self.phase(name))):
                return function(*args, **kwargs)

        return run

    def forward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the schedule's ``forward_step``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            chunk, micro_batch = kwargs.get("vp_stage") or 0, kwargs["current_microbatch"]
            self.recorder.enter(Moment(self.phase("forward"), chunk, micro_batch))
            before = self.recorder.memory.num_entries
            result = function(*args, **kwargs)
            if not micro_batch:  # what it keeps is not released before it has gone backward
                self.recorder.kept |= self.recorder.memory.kept_since(before)
            for output in tree_leaves(result[0]):
                if isinstance(output, Tensor):
                    output._dry_run_pass = chunk, micro_batch  # type: ignore[attr-defined]
            self._leave()
            return result

        return run

    def backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the schedule's ``backward_step``."""

        def run(inputs: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
            passes = (getattr(output, "_dry_run_pass", None) for output in tree_leaves(outputs))
            chunk, micro_batch = next(filter(None, passes))
            self.recorder.enter(Moment(self.phase("backward"), chunk, micro_batch))
            result = function(inputs, outputs, *args, **kwargs)
            self._leave()
            return result

        return run

    def after_passes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function that follows on all passes of a step."""

        @functools.wraps(function)  # so that Megatron's loop still finds what ends a global batch
        def run(*args: Any, **kwargs: Any) -> Any:
            self.recorder.enter(Moment(self.phase(BETWEEN)))
            return function(*args, **kwargs)

        return run

    def _leave(self) -> None:
        """What the schedule does after a pass, such as sending its result, belongs to the pass."""
        moment = self.recorder.moment
        self.recorder.enter(moment._replace(phase=self.phase(BETWEEN)))


# In the first step the optimizer has no state yet, and some checks do not run.
NUM_STEPS = 2
BETWEEN = "the rest"
