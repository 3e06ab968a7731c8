"""How a process ends if its command line or a setting cannot work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dynmoe.settings.messages.command_line import UsageError


@contextmanager
def without_traceback() -> Iterator[None]:
    """Print a ValueError without its traceback, so that the message with the remedy is seen."""
    try:
        yield
    except ValueError:
        sys.tracebacklimit = 0
        raise


@contextmanager
def exiting_on_misuse() -> Iterator[None]:
    """End the process with exit code 2 and one line if the command line cannot work.

    One rank of each machine prints the line. torchrun repeats it in its own last message.
    """
    try:
        yield
    except UsageError as error:
        report_to_torchrun(error)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def report_to_torchrun(error: Exception) -> None:
    """Make torchrun report this error of the rank in one line, in its last message.

    :mod:`megatron_dynmoe.torchrun_plugin` does the printing.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        raise error from None
    except Exception as raised:
        raised.with_traceback(None)
        get_error_handler().record_exception(raised)
