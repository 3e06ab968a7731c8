"""Iteration, folder and tracker, steps of optimizer and schedule, samples: do they fit?"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check
from megatron_dynmoe.storage.megatron_names import RELEASE, TRACKER, checkpoint_name, read_tracker
from megatron_dynmoe.storage.unpickle import StoredTensor

_OTHER = "the files are of several saves: take another iteration, or restore this one from a copy"


def check_tracker(folder: Path, iteration: int) -> Check:
    """Whether the folder's name, the tracker beside it and the saved iteration agree."""
    name, tracker = "tracker", folder.parent / TRACKER
    if folder.name not in (RELEASE, checkpoint_name(iteration)):
        is_numbered = re.fullmatch(r"iter_\d{7,}", folder.name)
        found = f"{folder} holds the state of iteration {iteration}"
        remedy = f"rename it to {checkpoint_name(iteration)}; Megatron goes on by the folder's name"
        return Check(name, FAILED if is_numbered else WARNING, found, remedy)
    if not tracker.is_file():
        remedy = f"write {iteration} into it, or --load finds nothing"
        return Check(name, WARNING, f"there is no {tracker}", remedy)
    remedy = f"write {iteration} into it, or resume with --ckpt-fallback"
    try:
        named = folder.parent / checkpoint_name(read_tracker(tracker))
    except ValueError as error:
        return Check(name, FAILED, str(error), remedy)
    if not named.is_dir():
        return Check(name, FAILED, f"{tracker} names {named.name}, which is missing", remedy)
    return Check(name, PASSED, f"{folder.name}; {TRACKER} names {named.name}")


def has_trained(args: Namespace, iteration: int) -> bool:
    """Whether the run that saved a checkpoint had taken a step of its own by then."""
    return iteration == 1 or (iteration > 0 and getattr(args, "curr_iteration", None) != 0)


def check_progress(args: Namespace, iteration: int, states: list[tuple[str, Any]]) -> list[Check]:
    """Whether all that counts steps or samples tells of the same step."""
    steps: dict[int, list[str]] = defaultdict(list)
    scheduled: set[int] = set()
    for where, state in states:
        for path, value in _steps(state, where):
            steps[value].append(path)
        scheduler = state.get("opt_param_scheduler") if isinstance(state, dict) else None
        if isinstance(scheduler, dict) and isinstance(scheduler.get("num_steps"), int):
            scheduled.add(scheduler["num_steps"])
    checks = [*_contradictions(args, iteration, steps, scheduled)]
    if checks:
        return checks
    taken = f", {next(iter(steps))} steps of the optimizer" if steps else ""
    consumed = getattr(args, "consumed_train_samples", None)
    samples = "" if consumed is None else f", {consumed} samples"
    return [Check("progress", PASSED, f"iteration {iteration}{taken}{samples}")]


def _contradictions(
    args: Namespace, iteration: int, steps: dict[int, list[str]], scheduled: set[int]
) -> Iterator[Check]:
    current = getattr(args, "curr_iteration", None)  # of the last step that was begun
    of_this_step = (iteration - 1, iteration)
    if has_trained(args, iteration) and isinstance(current, int) and current not in of_this_step:
        found = f"the saved arguments are of iteration {current + 1}, the state of {iteration}"
        yield Check("progress", FAILED, found, _OTHER)
    if len(steps) > 1:
        told = "; ".join(f"{step} in {paths[0]}" for step, paths in sorted(steps.items()))
        yield Check("progress", FAILED, f"the optimizers' steps differ: {told}", _OTHER)
    if len(scheduled) > 1:
        found = f"the schedules of the ranks differ: {sorted(scheduled)} samples"
        yield Check("progress", FAILED, found, _OTHER)
    consumed = getattr(args, "consumed_train_samples", None)
    if len(steps) == 1 and getattr(args, "override_ckpt_iteration", None) is None:
        ((step, paths),) = steps.items()
        yield from _lag(iteration, step, paths[0], scheduled, consumed)
    yield from _samples(args, iteration, consumed, scheduled)


def _lag(
    iteration: int, step: int, where: str, scheduled: set[int], consumed: int | None
) -> Iterator[Check]:
    """The optimizer takes one step an iteration, or none if it skips one (or begins afresh).

    The schedule moves with the optimizer. If the schedule has moved with every sample, no step was
    skipped.
    """
    found = f"the optimizer has taken {step} steps ({where}), at iteration {iteration}"
    if step > iteration:
        yield Check("progress", FAILED, found, _OTHER)
    elif step < iteration and scheduled == {consumed}:
        found += f", and the schedule {consumed} samples, so that none was skipped"
        yield Check("progress", FAILED, found, _OTHER)


def _samples(
    args: Namespace, iteration: int, consumed: int | None, scheduled: set[int]
) -> Iterator[Check]:
    batch = getattr(args, "global_batch_size", None)
    varies = getattr(args, "rampup_batch_size", None) or getattr(
        args, "step_batch_size_schedule", None
    )
    if consumed is None or not isinstance(batch, int) or varies or consumed == iteration * batch:
        return
    found = f"{consumed} samples were consumed, and {iteration} iterations of {batch} are "
    found += f"{iteration * batch}"
    if scheduled == {iteration * batch}:
        found += ", which is what the schedule has seen"
        yield Check("progress", FAILED, found, _OTHER)
    else:
        remedy = "right only if the run began with another --global-batch-size"
        yield Check("progress", WARNING, found, remedy)


def _steps(state: Any, path: str) -> Iterator[tuple[str, int]]:
    """Every count of an optimizer's steps in a nested state, with its place."""
    if isinstance(state, dict):
        for key, value in state.items():
            if key in ("step", "common_step"):
                if isinstance(value, StoredTensor) and value.numel == 1:
                    value = value.read().item()
                if isinstance(value, int | float):
                    yield path, int(value)
            elif key not in ("args", "rng_state", "rerun_state_machine"):
                yield from _steps(value, f"{path}.{key}")
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _steps(value, path)
