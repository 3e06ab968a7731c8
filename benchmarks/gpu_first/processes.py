"""One command at a time, with a limit on its time and output, of which nothing outlives its end.

Every process of a command carries a mark in its environment, which its children inherit. So all of
them are found again, also those that started a process group or session of their own, and those
whose parent has gone. This reads Linux's /proc. The command itself also ends if this process is
killed, whoever else is killed with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

MARK = "DYNMOE_GPU_FIRST"
GRACE = 1.0  # seconds between SIGTERM and SIGKILL
PATIENCE = 8.0  # seconds after SIGKILL: a process may have a GPU's memory to give back
MAX_LOG = 4 * 2**20  # bytes: a command that prints more is ended
POLL = 0.2  # seconds
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
clock = time.monotonic  # seconds, by which all limits go; tests of limits put one of theirs here


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: its exit code, negative for a signal; None if it was made to end.
        why: why it was made to end; "" if it ended by itself.
        seconds: how long it took.
    """

    code: int | None
    why: str
    seconds: float


def run(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    seconds: float,
    mark: str,
    watch: Callable[[], str],
) -> Ended:
    """Run a command until it ends, or has to.

    Args:
        command: the command and its arguments.
        folder: the working folder.
        environment: the whole environment.
        log: receives the command, and its stdout and stderr as they come.
        seconds: the limit.
        mark: what all its processes carry.
        watch: called every fifth of a second; returns a reason to end the command, or "".
    """
    begun = clock()
    with log.open("ab", buffering=0) as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        try:
            # A group of its own but no session: a session may outlive what a cluster ends.
            process = subprocess.Popen(
                command,
                bufsize=0,
                cwd=folder,
                env={**environment, MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=ending_with_parent(),
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            return Ended(127, "", clock() - begun)
        assert process.stdout is not None
        with process.stdout as pipe, selectors.DefaultSelector() as selector:
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ)
            room, why = MAX_LOG, ""
            while not why and process.poll() is None:
                if selector.select(POLL):
                    said = pipe.read(min(2**16, room))
                    if not said:  # it has closed its output, and goes on
                        time.sleep(POLL)
                    room -= file.write(said or b"")
                if room == 0:
                    why = f"printed more than {MAX_LOG / 2**20:g} MB"
                elif clock() - begun > seconds:
                    why = f"not done after {seconds:.0f} s"
                else:
                    why = watch()
            left = end_all(mark)
            while said := pipe.read(min(2**16, room)):
                room -= file.write(said)
        if why:
            file.write(f"\n{why}: ended\n".encode())
        if left:
            file.write(f"these processes cannot be ended: {left}\n".encode())
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    return Ended(None if why else process.returncode, why, clock() - begun)


def ending_with_parent() -> Callable[[], None]:
    """Make a ``preexec_fn``: the kernel kills the new process when this one ends, however it ends.

    Without it a process would outlive a parent that is killed between fork and exec, when the new
    one does not carry its mark yet.
    """
    library, parent = ctypes.CDLL(None), os.getpid()

    def tie() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before
            os._exit(1)

    return tie


def end_all(mark: str, grace: float = GRACE) -> list[int]:
    """End every process that carries the mark; returns those that cannot be ended.

    They get SIGTERM, and SIGKILL after ``grace`` seconds. One that starts meanwhile is found, too,
    and one that has a GPU's memory to give back is waited for.
    """
    number, killing = signal.SIGTERM, time.monotonic() + grace
    giving_up = killing + PATIENCE
    told: dict[int, signal.Signals] = {}
    looks = 0  # in a row that found none: one may just be starting
    while looks < 2 and time.monotonic() < giving_up:
        if time.monotonic() > killing:
            number = signal.SIGKILL
        left = _left(mark, told)
        for pid in left:
            if told.get(pid) != number:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                told[pid] = number
        looks = 0 if left else looks + 1
        time.sleep(0.02)
    return sorted(_left(mark, told))


def _left(mark: str, told: Iterable[int]) -> set[int]:
    """The processes that carry the mark, and those of the told that have not ended yet.

    A process loses its environment early in its end, and only then its files and its GPU.
    """
    return {*marked(mark), *(pid for pid in told if _is_ending(pid))}


def marked(mark: str) -> list[int]:
    """The processes that carry the mark."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def _is_ending(pid: int) -> bool:
    """Whether it is there, and does not only wait for somebody to read its exit code."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
