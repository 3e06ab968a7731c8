"""Providers that take turns, each in a place of its own, so that no failure ends a benchmark.

They take turns because machines drift: every round runs each of them once, in an order that
rotates, and a ratio is taken within a round. On CUDA a place is a process (:class:`Apart`), because
an illegal access fails everything that its process does afterwards. A provider that fails is left
out, and the others go on.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from benchmarks import measure

MIN_ROUNDS = 5  # however short the time
# Seconds for one answer of a process, which may have to compile.
PATIENCE = float(os.environ.get("BENCHMARK_PATIENCE", "300"))
clock = time.monotonic  # seconds; a test puts one of its own here
LAST_WORDS = 4000  # characters that are shown of what a process has printed that failed
LONGEST_REASON = 300  # characters, in a row


class Failed(Exception):
    """A provider does not run; in one line, why."""


def take_turns[Result](
    providers: Mapping[str, Callable[[], Result]],
    rounds: int,
    warm_up: int = 3,
    seconds: float = math.inf,
    leave_out: Callable[[str, Failed], None] | None = None,
) -> dict[str, list[Result]]:
    """Call every provider once a round.

    Args:
        providers: name to function.
        rounds: how many count.
        warm_up: rounds before those.
        seconds: after this time no round begins, once there are ``MIN_ROUNDS``.
        leave_out: hears of a provider that fails, which gets no further turn and has no results.
            If it is None, the failure is raised.

    Returns:
        The functions' results, in the order of the rounds.
    """
    results: dict[str, list[Result]] = {name: [] for name in providers}
    stop = clock() + seconds
    for number in range(-warm_up, rounds):
        names = [*results]
        if not names or (number >= MIN_ROUNDS and clock() > stop):
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            try:
                result = providers[name]()
            except Failed as failure:
                if leave_out is None:
                    raise
                leave_out(name, failure)
                del results[name]
            else:
                if number >= 0:
                    results[name].append(result)
    return results


class Here:
    """Where a provider lives: in this process."""

    def __init__(self) -> None:
        self._made: Any = None

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function.

        Raises:
            Failed: it raised an exception. Triton's are no RuntimeErrors.
        """
        try:
            return function(*args)
        except Failed:
            raise
        except Exception as error:
            traceback.print_exc()
            raise Failed(in_one_line(error)) from error

    def make(self, factory: Callable[..., Any], *args: Any) -> None:
        """Call a function and keep what it returns, in place of what was kept."""
        self._made = None
        self._made = self.run(factory, *args)

    def ask(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call a function of what is kept."""
        return self.run(method, self._made, *args)

    def close(self) -> None:
        """Let go of what is kept."""
        self._made = None


class Apart:
    """The same in a process of its own, which may die and is of no use after a failure.

    Functions, arguments and results must be picklable. What the process prints appears if it fails.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._files = ExitStack()
        folder = self._files.enter_context(tempfile.TemporaryDirectory())
        self._log = Path(folder) / "log"
        self._connection, theirs = context.Pipe()
        self._files.enter_context(self._connection)
        self._process = context.Process(target=_serve, args=(theirs, self._log))
        self._process.start()
        theirs.close()  # or nobody would notice that its owner is gone

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = PATIENCE) -> Any:
        """Call a function there.

        Raises:
            Failed: it raised an exception, took longer than ``seconds``, or ended the process.
        """
        return self._send("run", function, *args, seconds=seconds)

    def make(self, factory: Callable[..., Any], *args: Any) -> None:
        """Let it keep what a function returns."""
        self._send("make", factory, *args)

    def ask(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call a function of what is kept there."""
        return self._send("ask", method, *args)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._files.close()

    def _send(self, verb: str, *args: Any, seconds: float = PATIENCE) -> Any:
        try:
            self._connection.send((verb, *args))
            if not self._connection.poll(None if math.isinf(seconds) else max(0.0, seconds)):
                raise Failed(f"no answer after {seconds:.0f} s")
            succeeded, answer = self._connection.recv()
            if not succeeded:
                raise Failed(answer)
            return answer
        except (OSError, EOFError):
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            self._show_log()
            raise Failed(f"its process ended with {how}") from None
        except Failed:
            self._show_log()
            raise

    def _show_log(self) -> None:
        print(self._log.read_text(errors="replace")[-LAST_WORDS:], flush=True)


def _serve(connection: Connection, log: Path) -> None:
    """What the process of an :class:`Apart` does: as it is told, until its owner is gone."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    here = Here()
    while True:
        verb, *args = connection.recv()
        try:
            answer = True, getattr(here, verb)(*args)
        except Failed as failure:
            answer = False, str(failure)
        connection.send(answer)


def _end_with_parent() -> None:
    """Whoever kills a benchmark does not want its providers on the GPU."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def new_place() -> Here | Apart:
    """A place for one provider."""
    return Apart() if measure.on_gpu() else Here()


def in_one_line(error: BaseException) -> str:
    """Its name and what it says, not all if that is long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_REASON else textwrap.shorten(text, LONGEST_REASON)


class Turns:
    """Providers in places of their own, of which those that fail are left out.

    Use it as a context, which ends the places.

    Attributes:
        running: the names of the others.
    """

    def __init__(self, new_place: Callable[[], Here | Apart] = new_place) -> None:
        self.running: list[str] = []
        self._new_place = new_place
        self._places: dict[str, Here | Apart] = {}
        self._leave_out: Callable[[str, Failed], None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for place in self._places.values():
            place.close()

    def make(
        self, factories: Mapping[str, tuple[Any, ...]], leave_out: Callable[[str, Failed], None]
    ) -> None:
        """Make providers, in the places of those that had these names before.

        Args:
            factories: name to a function and its arguments.
            leave_out: hears of each that fails, now or later, once.
        """
        self.running, self._leave_out = [*factories], leave_out
        for name in factories:  # processes start at the same time
            if name not in self._places:
                self._places[name] = self._new_place()
        for name, factory in factories.items():
            try:
                self._places[name].make(*factory)
            except Failed as failure:
                self._drop(name, failure)

    def ask(self, name: str, method: Callable[..., Any], *args: Any) -> Any:
        """A function of a provider that runs; None if it fails."""
        try:
            return self._places[name].ask(method, *args)
        except Failed as failure:
            self._drop(name, failure)

    def ask_all(self, method: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """A function of each that runs, without those that fail."""
        found = {name: self.ask(name, method, *args) for name in [*self.running]}
        return {name: answer for name, answer in found.items() if name in self.running}

    def take(
        self, method: Callable[..., Any], rounds: int, warm_up: int = 3, seconds: float = math.inf
    ) -> dict[str, list[Any]]:
        """A function of all that run, round after round: see :func:`take_turns`."""
        providers = {name: partial(self._places[name].ask, method) for name in self.running}
        return take_turns(providers, rounds, warm_up, seconds, self._drop)

    def _drop(self, name: str, failure: Failed) -> None:
        print(f"{name} is left out: {failure}", flush=True)
        self.running.remove(name)
        self._places.pop(name).close()
        self._leave_out(name, failure)
