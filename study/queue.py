"""Trains the runs that are not finished, several at a time, and saves them if it is stopped.

One study at a time works in a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType

from megatron_dynmoe.runs.progress_lines import progress_of, shorten
from study.corpus import Corpus
from study.runs import ERRORS, LOG, Run, start

NICENESS = 5  # the study goes on in the background
# A signal to the group of make and its study comes once more, from make.
SAME_SIGNAL = 1.0  # seconds


class Queue:
    """Runs that are trained in order; if one fails, the others are still trained.

    Args:
        runs: all runs of the study.
        jobs: how many runs train at a time.
    """

    def __init__(self, runs: Sequence[Run], corpus: Corpus, jobs: int) -> None:
        self._waiting = [run for run in runs if not run.is_finished]
        self._num_runs = len(runs)
        self._corpus, self._jobs = corpus, jobs
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self._left = {run.name: run.size.steps - run.iteration for run in self._waiting}
        self._trained_steps, self._num_finished = 0, len(runs) - len(self._waiting)
        self._width = max((len(run.name) for run in runs), default=0)
        self._started = time.monotonic()
        self.stopped_by: int | None = None  # a signal
        self.failures: list[str] = []

    def train(self, then: Callable[[Run], None] | None = None) -> None:
        """Train all runs. After SIGINT or SIGTERM, save the running ones and return early.

        Args:
            then: called with each run that has finished, while the next one is trained.
        """
        if not self._waiting:
            return
        with self._stopping(), ThreadPoolExecutor(self._jobs) as pool:
            self._started = time.monotonic()
            futures = {pool.submit(self._train, run): run for run in self._waiting}
            for future in as_completed(futures):
                future.result()
                if then is not None and futures[future].is_finished:
                    then(futures[future])

    def _train(self, run: Run) -> None:
        with self._lock:
            if self.stopped_by is not None:
                return
            action = f"going on from step {run.iteration}" if run.iteration else "starting"
            self._say(run, action)
            process = start(run, self._corpus)
            self._processes.add(process)
        assert process.stdout is not None
        begun_at = run.iteration
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        with process, open(run.folder / LOG, "a") as log:
            for line in process.stdout:
                log.write(line)
                self._show(run, line)
            # Popen.wait would discard the times.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode in (0, 128 + signal.SIGTERM):  # at its end, or stopped and saved
            run.add_times(run.iteration - begun_at, usage.ru_utime + usage.ru_stime)
        with self._lock:
            self._processes.discard(process)
            self._left[run.name] = 0
            self._num_finished += run.is_finished
        if run.is_finished:
            self._say(run, f"finished. {self._summary()}")
        elif self.stopped_by is None:
            reason = _reason(run, process.returncode)
            self.failures.append(f"{run.name}: {reason}")
            self._say(run, f"failed: {reason}")

    def _show(self, run: Run, line: str) -> None:
        if (done := progress_of(line)) is not None:
            with self._lock:
                left = run.size.steps - done
                self._trained_steps += self._left[run.name] - left
                self._left[run.name] = left
        if (short := shorten(line)) is not None:
            self._say(run, short.strip())

    def _say(self, run: Run, text: str) -> None:
        # In one write: print ends its line with a second one, and others write in between.
        sys.stdout.write(f"{run.name:<{self._width}}  {text}\n")
        sys.stdout.flush()

    def _summary(self) -> str:
        """How far the study is, and how long it will take by the mean time of a step so far."""
        with self._lock:
            steps, left = self._trained_steps, sum(self._left.values())
            text = f"Study: {self._num_finished} of {self._num_runs} runs"
        if not steps or not left:
            return text
        seconds = round((time.monotonic() - self._started) / steps * left)
        return f"{text}, about {seconds // 3600}:{seconds // 60 % 60:02d} hours left"

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """At SIGINT or SIGTERM the trainings save and end; at a second one they end at once."""

        stopped_at = 0.0

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal stopped_at
            again = self.stopped_by is not None
            if again and time.monotonic() - stopped_at < SAME_SIGNAL:
                return
            self.stopped_by, stopped_at = number, time.monotonic()
            for process in tuple(self._processes):
                process.send_signal(signal.SIGKILL if again else signal.SIGTERM)
            if not again:
                # Not print: the signal may have interrupted a print.
                os.write(1, b"stopping: the running trainings save a checkpoint (once more: now)\n")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _reason(run: Run, code: int) -> str:
    """The last line of the training's output, and the file that has the rest."""
    path: Path = run.folder / ERRORS
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else 'no message'} ({path})"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two studies in one folder would train the same runs."""
    with open(folder / "lock.json", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = json.loads(lock.read() or "{}").get("process", "unknown")
            raise ValueError(f"another study runs in {folder} (process {holder}).") from None
        lock.truncate(0)
        json.dump({"process": os.getpid()}, lock)
        lock.flush()
        yield
