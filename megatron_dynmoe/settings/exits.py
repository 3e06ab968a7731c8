"""How a process ends that was asked for what cannot be."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dynmoe.settings.command_line import UsageError


@contextmanager
def refusing_plainly() -> Iterator[None]:
    """Let a refusal be the last thing seen: it says what to do, and a stack would bury it."""
    try:
        yield
    except ValueError:
        sys.tracebacklimit = 0
        raise


@contextmanager
def ending_at_misuse() -> Iterator[None]:
    """End the process with exit code 2 and one line if the command line cannot work.

    One rank of each machine says it. torchrun speaks last, and says that line, too.
    """
    try:
        yield
    except UsageError as error:
        tell_torchrun(error)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def tell_torchrun(error: Exception) -> None:
    """Have torchrun, which speaks last, say this of the rank in one line.

    See :mod:`megatron_dynmoe.torchrun_plugin` for how.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        raise error from None
    except Exception as raised:
        raised.with_traceback(None)
        get_error_handler().record_exception(raised)
