"""What torchrun does otherwise if this package is installed: the entry point ``torchrun.handlers``.

torchrun's agent is a process without any of a run's own code, and two things that people meet
happen in it: before there is a rank, it waits five minutes for a machine's name that leads nowhere;
and after Ctrl-C it buries what the run has said under a stack of its own. torchrun loads the
plugins of all installed packages when it starts, and if one fails it says so and goes on without.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from megatron_dynmoe.jobs.host_names import loopback, own_name, resolves_to_this_machine

_MISUSE = 2  # the exit code of a command line that cannot work

# torchrun takes the default of each of its flags from such a variable.
LOCAL_ADDRESS = "PET_LOCAL_ADDR"


def rendezvous_handler() -> Callable[[Any], Any]:
    """Settle what the agent needs; called by torchrun when it starts.

    Returns:
        A rendezvous as of ``--rdzv-backend c10d``: a plugin has to be one.
    """
    if _is_torchrun(sys.orig_argv):
        fix_local_address(sys.orig_argv)
        if _starts_this_package(sys.orig_argv):
            sys.excepthook = in_few_lines(sys.excepthook)

    def handler(parameters: Any) -> Any:
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

        backend, store = create_backend(parameters)
        return create_handler(store, backend, parameters)

    return handler


def fix_local_address(command: list[str]) -> None:
    """Give the agent an address if the name that it would tell its ranks leads nowhere.

    On one machine that is the machine itself; of several ones nothing is guessed, but said.
    """
    flags = {word.partition("=")[0].replace("_", "-") for word in command}
    is_standalone = "--standalone" in flags or os.environ.get("PET_STANDALONE", "0") != "0"
    meets_by_name = is_standalone or "--rdzv-endpoint" in flags or "PET_RDZV_ENDPOINT" in os.environ
    if not meets_by_name or "--local-addr" in flags or LOCAL_ADDRESS in os.environ:
        return
    name = own_name()
    if resolves_to_this_machine(name):
        return
    if is_standalone:
        os.environ[LOCAL_ADDRESS] = loopback()
    else:
        sys.stderr.write(
            f"torchrun: this machine's name, {name}, does not lead to it, so the other machines "
            "may wait for it for minutes: give each torchrun --local-addr ADDRESS\n"
        )


def in_few_lines(show: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an ``excepthook`` so that it adds nothing if a rank has already said what happened.

    After a signal nothing has failed, and the first rank has said where the run is. An error of a
    rank without a stack, such as a refused command line, is one line here as well.
    """

    def hook(kind: type[BaseException], error: Any, trace: TracebackType | None) -> None:
        if kind.__name__ == "SignalException":
            return
        if kind.__name__ == "ChildFailedError":
            rank, failure = error.get_first_failure()
            words = failure.message
            if isinstance(words, dict):
                words = words.get("extraInfo", {}).get("py_callstack", "").strip()
                words = words.removeprefix("Traceback (most recent call last):\n")
                line = words.partition(": ")[2]
                if line and "\n" not in words:
                    end = f"torchrun: rank {rank} ended with exit code {failure.exitcode}"
                    sys.stderr.write(f"{end}: {line}\n")
                    if failure.exitcode == _MISUSE:
                        sys.exit(_MISUSE)  # in place of torchrun's 1
                    return
        show(kind, error, trace)

    return hook


def _starts_this_package(command: list[str]) -> bool:
    """Whether the ranks are of this package, by its name or through the launch scripts."""
    return any("megatron_dynmoe" in word or word.endswith("launch/rank.sh") for word in command)


def _is_torchrun(command: list[str]) -> bool:
    return any(
        word == "torch.distributed.run" or os.path.basename(word) == "torchrun"
        for word in command[:8]  # of Python's own options there are few
    )
