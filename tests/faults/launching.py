"""Starts the ranks of a run as real processes that can be killed, and watches them end.

Under torchrun's agent, or one by one as ``srun`` does it: no agent, only ``RANK`` and the like.
Each rank is forked from a process that has imported everything (:mod:`tests.faults.imported`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from tests.faults.kill_points import Kill, noted_pids
from tests.helpers.ports import reserved_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.imported"])

TORCHRUN, ONE_BY_ONE = "torchrun", "one by one"
PATIENCE = 240  # seconds until something has to happen, on a busy machine


@dataclass(frozen=True)
class Attempt:
    """Processes of a run, and the folder with their logs, process ids and steps."""

    folder: Path
    started: list[BaseProcess]
    keeper: socket.socket | None = None  # of the port at which ranks without an agent meet

    def log(self) -> str:
        """The ends of all logs."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)

    def exit_codes(self) -> list[int | None]:
        """Of the processes that were started here: torchrun's agent, or every rank."""
        return [process.exitcode for process in self.started]

    def alive(self) -> list[int]:
        """Process ids of ranks and agent that still run."""
        return [pid for pid in noted_pids(self.folder) if _runs(pid)]

    def wait_until_all_have_ended(self, seconds: float) -> float:
        """Returns when the last one had ended (seconds since the epoch).

        Raises:
            AssertionError: some still run; they are killed.
        """
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in self.started) or self.alive():
            if time.monotonic() > end:
                log, alive = self.log(), self.alive()
                self.kill()
                raise AssertionError(f"{alive} still run after {seconds:.0f} s\n{log}")
            time.sleep(0.02)
        return time.time()

    def kill(self) -> None:
        """End whatever still runs."""
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        for process in self.started:
            process.kill()
            process.join()


def start(
    launcher: str, num_ranks: int, flags: list[str], folder: Path, kill: Kill | None = None
) -> Attempt:
    """Start all ranks of ``python -m megatron_dynmoe.pretrain FLAGS``.

    Args:
        launcher: :data:`TORCHRUN` or :data:`ONE_BY_ONE`.
        num_ranks: all on this machine.
        flags: the command line.
        folder: for logs and records; made here.
        kill: what is to happen to them.
    """
    folder.mkdir(parents=True)
    if launcher == TORCHRUN:
        agent = CONTEXT.Process(target=_agent, args=(num_ranks, flags, folder, kill))
        agent.start()
        return Attempt(folder, [agent])
    keeper, port = reserved_port()
    ranks = []
    for rank in range(num_ranks):
        world = {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)},
            **{"LOCAL_WORLD_SIZE": str(num_ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        }
        ranks.append(CONTEXT.Process(target=_rank, args=(flags, folder, kill, world)))
        ranks[-1].start()
    return Attempt(folder, ranks, keeper)


def _agent(num_ranks: int, flags: list[str], folder: Path, kill: Kill | None) -> None:
    """What the ``torchrun`` command does after it has read its own flags."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has tests ignore
    _output_to(folder / "agent.log")
    _note_pid(folder, "agent")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=folder.name,
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, _rank)(flags, folder, kill, {})


def _rank(flags: list[str], folder: Path, kill: Kill | None, world: dict[str, str]) -> None:
    """One rank: everything it says goes to its log, every step to a line of its record."""
    from megatron_dynmoe.pretrain import main
    from tests.distributed.worker import Recorder
    from tests.faults.kill_points import StepFile, dying

    os.environ.update(world)
    # As in a process that was started by itself; the fork server has handed on its own way.
    multiprocessing.set_start_method("fork", force=True)
    rank = int(os.environ["RANK"])
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    _output_to(folder / f"rank{rank}.log")
    _note_pid(folder, f"rank{rank}")
    sys.argv = ["pretrain", *flags]
    recorder = Recorder(folder)
    recorder.result["steps"] = StepFile(folder / f"rank{rank}.steps")
    fate = contextlib.nullcontext() if kill is None else dying(kill, rank, folder)
    with fate, recorder.watching():
        main()


def _output_to(path: Path) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _note_pid(folder: Path, name: str) -> None:
    (folder / f"{name}.pid").write_text(str(os.getpid()))


def _runs(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        # An orphan that has ended stays a zombie if nobody waits for it.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
