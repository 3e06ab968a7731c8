"""SIGTERM, SIGINT and SIGHUP finish the step, save one checkpoint and exit with 128 + signal."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from multiprocessing.util import Finalize
from types import FrameType
from typing import NoReturn

import torch
from megatron.training import global_vars

from megatron_dynmoe.runs.folder import mark_stopped
from megatron_dynmoe.settings.messages.exits import report_to_torchrun

# If the parent ignores one of these (nohup, a script's background job), the run ignores it too.
_OPTIONAL = (signal.SIGINT, signal.SIGHUP)


def add_flag(parser: ArgumentParser) -> ArgumentParser:
    """Add ``--no-exit-signal-handler``; without it Megatron's flag is the default here."""
    parser.set_defaults(exit_signal_handler=True)
    parser.add_argument(
        "--no-exit-signal-handler",
        action="store_false",
        dest="exit_signal_handler",
        help="Let SIGTERM, SIGINT and SIGHUP end the run at once, without a checkpoint.",
    )
    return parser


def disable_without_training(args: Namespace) -> None:
    """If nothing is trained, leave signals to the system: only training asks for them."""
    args.exit_signal_handler = args.exit_signal_handler and not args.skip_train


class Stopped(Exception):
    """A signal has ended the run in good order."""


class StopSignals:
    """Records the signals that ask a run to end; replaces upstream's handler.

    Attributes:
        agreed: the signal that the ranks have agreed on, or 0.
    """

    def __init__(self, signum: int = signal.SIGTERM) -> None:
        """Listen for the given signal, and in any case for SIGTERM, SIGINT and SIGHUP."""
        self._always = {int(signum), int(signal.SIGTERM)}
        self._received = 0
        self.agreed = 0

    def __enter__(self) -> StopSignals:
        wanted = {number for number in _OPTIONAL if signal.getsignal(number) != signal.SIG_IGN}
        for number in wanted | self._always:
            signal.signal(number, self._on_signal)
        if torch.utils.data.get_worker_info() is None:
            Finalize(None, _end_data_workers, exitpriority=0)
        return self

    def signals_received(self) -> list[int]:
        """The signals that any rank has received. Megatron asks after every step.

        All ranks take part in one small reduction.
        """
        heard = torch.tensor(
            [self._received], dtype=torch.int32, device=torch.cuda.current_device()
        )
        torch.distributed.all_reduce(heard, op=torch.distributed.ReduceOp.MAX)
        self.agreed = int(heard.item())
        return [self.agreed]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A second signal changes nothing: torchrun sends its own after a Ctrl-C in the terminal.
        if not self._received and torch.utils.data.get_worker_info() is None:
            name = signal.Signals(number).name
            saves = getattr(global_vars._GLOBAL_ARGS, "save", None)
            what = "with a checkpoint" if saves else "without a checkpoint, as --save is not given"
            text = f"\n{name}: ending after this step, {what} (Ctrl-\\ ends at once)\n"
            os.write(2, text.encode())  # the signal may have interrupted a print
        self._received = self._received or number


def _end_data_workers() -> None:
    """Kill the data loader's processes at the end of this process.

    Such a process handles SIGTERM too, so that it does not end before its rank has saved. But
    ``multiprocessing`` sends SIGTERM to its children at exit and then waits for them, for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises if a worker is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def stop_signal() -> str | None:
    """The name of the signal that the ranks have agreed to end by; None if there is none."""
    handler = global_vars._GLOBAL_SIGNAL_HANDLER
    if not isinstance(handler, StopSignals) or not handler.agreed:
        return None
    return signal.Signals(handler.agreed).name


def exit_with_signal_code(reason: str) -> NoReturn:
    """Exit with 128 + the signal if a signal ended the training loop, else with 0.

    A run that was told to stop has not finished: jobs that wait for its success must not start.

    Args:
        reason: the text that torchrun prints about this rank.
    """
    name = stop_signal()
    if name is None:
        sys.exit(0)
    if torch.distributed.get_rank() == 0:
        mark_stopped(name)
    report_to_torchrun(Stopped(reason))
    torch.distributed.barrier()  # once one rank fails, launchers end all; some may still write
    sys.exit(128 + signal.Signals[name])
