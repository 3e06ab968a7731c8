"""``kill -9`` at a chosen or a random moment of a training: the rank does it to itself, or to all.

A moment is a place in the code at a given iteration, so that it is met for certain, or a number of
seconds after a step began, which may be anywhere; either way ``killed.json`` says where the rank
was.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_dynmoe.storage.megatron_names import TRACKER

ONE_RANK, ALL_RANKS, EVERYTHING = "one rank", "all ranks", "all ranks and their launcher"

FORWARD = "in the forward pass"
UPDATE = "in the controller's update, between stage and commit"
SHARDS = "before it writes its part of a checkpoint"
METADATA = "in a checkpoint whose parts are written"
TRACKER_BEFORE = "before it names the new checkpoint"
TRACKER_WITHIN = "while it names the new checkpoint"
LOADING = "while it loads a checkpoint"
ANY_MOMENT = "at a random moment"

SAVE_PHASES = (SHARDS, METADATA, TRACKER_BEFORE, TRACKER_WITHIN)
LONGEST_DELAY = 0.3  # seconds

# Where the main thread is, by the innermost of these functions.
IN_A_STEP, SAVING, AT_LOADING = "in a step", "while saving", "while loading"
BETWEEN, AFTERWARDS = "between steps", "after the training"
_PLACES = {"train_step": IN_A_STEP, "save_checkpoint": SAVING, "load_checkpoint": AT_LOADING}


@dataclass(frozen=True)
class Kill:
    """One ``kill -9``.

    Attributes:
        phase: one of the phases above.
        iteration: that is under way, or after which the checkpoint is saved; for LOADING, any.
        victims: who dies.
        rank: whose moment it is, and who dies alone with ONE_RANK.
        delay: for ANY_MOMENT, seconds from the beginning of the iteration.
        signal: SIGSTOP lets them hang instead.
    """

    phase: str
    iteration: int
    victims: str
    rank: int
    delay: float = 0
    signal: int = signal.SIGKILL

    @property
    def place(self) -> str | None:
        """Where the main thread has to be, if the phase says so."""
        if self.phase in SAVE_PHASES:
            return SAVING
        return {FORWARD: IN_A_STEP, UPDATE: IN_A_STEP, LOADING: AT_LOADING}.get(self.phase)

    def checkpoint_before(self, interval: int) -> int:
        """The iteration of the last complete checkpoint, where the phase says it for certain."""
        return (self.iteration - 1) // interval * interval


def draw_kill(
    generator: random.Random, phase: str, reached: int, steps: int, interval: int, num_ranks: int
) -> Kill:
    """A kill in a phase of a run that goes on from iteration ``reached``."""
    if phase in SAVE_PHASES:
        iteration = generator.randrange(reached + interval, steps + 1, interval)
    else:
        iteration = generator.randint(reached + 1, steps)
    return Kill(
        phase=phase,
        iteration=iteration,
        victims=generator.choice((ONE_RANK, ALL_RANKS, EVERYTHING)),
        # Only the first rank writes the metadata and names the checkpoint.
        rank=0 if phase in SAVE_PHASES[1:] else generator.randrange(num_ranks),
        delay=generator.uniform(0, LONGEST_DELAY),
    )


class StepFile:
    """Takes the steps of a Recorder, and leaves each in a file at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: dict[str, Any]) -> None:
        from megatron_dynmoe.control.update import finished_iterations

        with open(self.path, "a") as file:
            file.write(json.dumps({"iteration": finished_iterations() + 1} | step) + "\n")


@contextlib.contextmanager
def dying(kill: Kill, rank: int, folder: Path) -> Iterator[None]:
    """Have the kill happen during the block, or at its end at the latest."""
    if rank != kill.rank:
        yield
        return
    from megatron.training import training

    under_way = 0

    def die(has_ended: bool = False) -> None:
        _die(kill, rank, folder, under_way, has_ended)

    def is_due() -> bool:
        return kill.phase == LOADING or under_way == kill.iteration

    train_step = training.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal under_way
        from megatron_dynmoe.control.update import finished_iterations

        under_way = finished_iterations() + 1
        if kill.phase == ANY_MOMENT and is_due():
            timer = threading.Timer(kill.delay, die)
            timer.daemon = True
            timer.start()
        return train_step(*args, **kwargs)

    training.train_step = step
    _ARM[kill.phase](die, is_due)
    yield
    die(has_ended=True)


def _in_the_forward_pass(die: Callable[[], None], is_due: Callable[[], bool]) -> None:
    from megatron_dynmoe.moe.router import DynamicRouter

    _die_on_call(DynamicRouter, "routing", die, is_due)


def _between_stage_and_commit(die: Callable[[], None], is_due: Callable[[], bool]) -> None:
    from megatron_dynmoe.control.update import GlobalBatchUpdate

    _die_on_call(GlobalBatchUpdate, "_commit", die, is_due)


def _die_on_call(
    owner: type, name: str, die: Callable[[], None], is_due: Callable[[], bool]
) -> None:
    original = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        if is_due():
            die()
        return original(*args, **kwargs)

    setattr(owner, name, called)


def _at_a_file(part_of_name: str, is_written: bool) -> Callable[..., None]:
    """Just before a file is opened, by whatever function."""

    def is_met(event: str, args: tuple[Any, ...]) -> bool:
        if event != "open" or part_of_name not in str(args[0]):
            return False
        return bool(args[2] & (os.O_WRONLY | os.O_RDWR)) == is_written

    return _at_an_event(is_met)


def _at_a_renaming(new_name: str) -> Callable[..., None]:
    """Just before a file gets its final name."""
    return _at_an_event(
        lambda event, args: event == "os.rename" and str(args[1]).endswith(new_name)
    )


def _at_an_event(is_met: Callable[[str, tuple[Any, ...]], bool]) -> Callable[..., None]:
    def arm(die: Callable[[], None], is_due: Callable[[], bool]) -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if is_met(event, args) and is_due():
                die()

        sys.addaudithook(hook)

    return arm


_ARM: dict[str, Callable[..., None]] = {
    FORWARD: _in_the_forward_pass,
    UPDATE: _between_stage_and_commit,
    SHARDS: _at_a_file(".distcp", is_written=True),
    METADATA: _at_a_file("metadata.json", is_written=True),
    TRACKER_BEFORE: _at_a_file(TRACKER, is_written=True),
    TRACKER_WITHIN: _at_a_renaming(TRACKER),
    LOADING: _at_a_file(".distcp", is_written=False),
    ANY_MOMENT: lambda die, is_due: None,
}


def _die(kill: Kill, rank: int, folder: Path, under_way: int, has_ended: bool) -> None:
    told = {
        "at": time.time(),
        "iteration": under_way,
        "place": AFTERWARDS if has_ended else _place_of_main_thread(),
    }
    beside = folder / f"killed.{rank}"
    beside.write_text(json.dumps(told))
    beside.rename(folder / "killed.json")
    names = {ONE_RANK: f"rank{rank}.pid", ALL_RANKS: "rank*.pid", EVERYTHING: "*.pid"}
    victims = noted_pids(folder, names[kill.victims])
    for child in psutil.Process().children(recursive=True):  # they load data, and have to end too
        (folder / f"child-{child.pid}.pid").write_text(str(child.pid))
    for pid in victims - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, kill.signal)
    os.kill(os.getpid(), kill.signal)


def _place_of_main_thread() -> str:
    frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    places = [_PLACES[frame.name] for frame in frames if frame.name in _PLACES]
    return places[-1] if places else BETWEEN


def noted_pids(folder: Path, names: str = "*.pid") -> set[int]:
    """Process ids that ranks and agent have noted; one that was killed meanwhile left nothing."""
    return {int(text) for path in folder.glob(names) if (text := path.read_text())}
