"""Runs any script that uses Megatron with this package's CPU layer and patches underneath.

    torchrun --standalone --nproc-per-node 2 -m megatron_dynmoe.run pretrain_gpt.py FLAGS

One process needs no launcher: plain ``python -m`` does. On a machine with CUDA only the patches of
:mod:`megatron_dynmoe.upstream.patches` are applied.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import socket
import sys
from argparse import ArgumentParser
from pathlib import Path

from megatron_dynmoe.jobs.host_names import fix_master_address
from megatron_dynmoe.settings.messages.command_line import RaisingParser, UsageError
from megatron_dynmoe.settings.messages.exits import exiting_on_misuse, without_traceback

_PR_SET_PDEATHSIG = 1  # of prctl(2)
# Megatron looks at the second name only, when it warns of what goes badly with these settings.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare() -> None:
    """Install the CPU layer if it is wanted, and the patches. Call before using Megatron.

    On a GPU also let the allocator's segments expand, unless the environment has settings for it.
    Ends the process if a variable of the environment asks for what there is not.

    Raises:
        ValueError: the first machine is not to be found.
    """
    from megatron_dynmoe import kernels
    from megatron_dynmoe.backends import cpu

    with without_traceback(), exiting_on_misuse():
        is_on_cpu = cpu.wanted()
        kernels.asked_for()
        if "RANK" not in os.environ:
            _set_up_a_single_process()
        else:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                _end_if_torchrun_is_killed()
            fix_master_address()
    if is_on_cpu:
        cpu.install()
    else:
        expand_segments()
    from megatron_dynmoe.upstream import patches

    patches.install()


def expand_segments() -> None:
    """Set what PyTorch's allocator reads when it is first used.

    The rows of an expert are as many as tokens chose it, so that sizes differ from step to step.
    Segments of a fixed size would fragment.
    """
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR_VARIABLES[-1]] = "expandable_segments:True"


def _set_up_a_single_process() -> None:
    """Set what torchrun would, so that one process can be started by hand.

    Raises:
        UsageError: this is one of several Slurm tasks, which would all be worlds of their own.
    """
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1":
        raise UsageError(
            f"SLURM_NTASKS is {tasks}, but RANK is not set: let every task start torchrun, or set "
            "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
        )
    # Never closed: nobody else is given this port in the seconds until torch listens on it, which
    # it may all the same, because this socket does not.
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("127.0.0.1", 0))
    port = keeper.getsockname()[1]
    keeper.detach()
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def _end_if_torchrun_is_killed() -> None:
    """Have Linux send SIGTERM when torchrun is gone.

    Killed with SIGKILL it leaves its ranks behind. They would train on unseen, and save into the
    folder of the run that takes their place.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Run the script named on the command line as ``__main__``."""
    with exiting_on_misuse():
        if len(sys.argv) < 2:
            raise UsageError("usage: python -m megatron_dynmoe.run SCRIPT [ARGS ...]")
        script = Path(sys.argv[1])
        if not script.is_file():
            raise UsageError(f"megatron_dynmoe.run: there is no script at {script}")
    prepare()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.resolve().parent))
    # Whatever parser the script has: Megatron's prints 1,500 lines of usage before an error.
    ArgumentParser.error = RaisingParser.error  # type: ignore[method-assign, assignment]
    with exiting_on_misuse():
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
