"""Whether this machine can run a dry run; asked before anything large is imported."""

from __future__ import annotations

import os
import resource

import psutil

from megatron_dynmoe.dry_run.devices import shim
from megatron_dynmoe.settings.messages.command_line import UsageError

# What the process needs, measured: 0.9 GB for the largest recipe, of which torch takes 0.6; and of
# addresses 4.2 GB, which CUDA's libraries take although nothing of them runs.
NEEDED_BYTES = 1.2e9
NEEDED_ADDRESSES = 4.5e9


def check() -> None:
    """Refuse a machine that cannot.

    Raises:
        UsageError: the environment asks for the CPU.
        OSError: there is too little memory or no C compiler.
    """
    if os.environ.get("DYNMOE_DEVICE") == "cpu":
        raise UsageError(
            "DYNMOE_DEVICE is 'cpu', and a dry run counts what a GPU would do: unset it."
        )
    shim.find_compiler()
    free = psutil.virtual_memory().available
    if free < NEEDED_BYTES:
        raise OSError(
            f"{free / 1e9:.1f} GB of this machine's memory are free, and a dry run needs "
            f"{NEEDED_BYTES / 1e9:g}: end other programs, or run it on another machine."
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if resource.RLIM_INFINITY != limit < NEEDED_ADDRESSES:
        raise OSError(
            f"this shell limits a process to {limit / 1e9:.1f} GB of addresses, and PyTorch in a "
            f"dry run needs {NEEDED_ADDRESSES / 1e9:g}, most of which it never fills: raise the "
            "limit (ulimit -v unlimited), or run it on another machine."
        )
