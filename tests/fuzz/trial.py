"""Runs one command line in forked processes and says what came of it."""

from __future__ import annotations

import contextlib
import json
import linecache
import math
import os
import re
import shlex
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_dynmoe.settings.config import SETTINGS
from megatron_dynmoe.settings.messages.command_line import UsageError
from tests.fuzz.command_lines import CommandLine
from tests.helpers.ports import reserved_port

# From the start of a trial. A calm machine needs two seconds.
TIME_LIMIT = 150.0
# A rank that waits for one that has stopped is ended, as torchrun would do.
GRACE = 3.0
PACKAGE = "megatron_dynmoe"
# What upstream refuses on purpose it says by one of these, or by a statement that raises.
UPSTREAM_REFUSALS = ("AssertionError", "ValueError", "NotImplementedError", "ImportError")
# Those of upstream's rerun state machine, at a loss that is NaN: what a learning rate may do.
NOT_FINITE = ("16", "17")
A_RESULT = "a result that is not finite"


class Outcome(NamedTuple):
    """What came of a trial.

    ``kind`` is ``trained``, ``refused by us``, ``refused by upstream``, or starts with FAILED.
    """

    kind: str
    message: str

    @property
    def failed(self) -> bool:
        return self.kind.startswith("FAILED")


def attempt(line: CommandLine, directory: Path) -> Outcome:
    """Train as a command line says, each rank in a child of this process.

    Args:
        directory: for logs and results; what earlier trials left there is overwritten.
    """
    results = [directory / f"rank{rank}.json" for rank in range(line.num_ranks)]
    for path in results:
        path.unlink(missing_ok=True)
    keeper, port = reserved_port()
    with keeper:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children = {_start(line, rank, path): rank for rank, path in enumerate(results)}
        hung = _wait(children)
    found = [json.loads(path.read_text()) for path in results if path.exists()]
    outcomes = [judge(line, result) for result in found]
    # One rank's own error comes before those of the ranks that then waited for it in vain, and what
    # should not be before what may be.
    outcomes.sort(key=lambda outcome: ("Connection" in outcome.message, not outcome.failed))
    if hung:
        return Outcome("FAILED: hang", f"no end after {TIME_LIMIT:.0f} s")
    stopped = [outcome for outcome in outcomes if outcome.kind != "trained"]
    if stopped:
        return stopped[0]
    if len(found) < line.num_ranks:
        return Outcome("FAILED: a process died", (directory / "rank0.log").read_text()[-500:])
    return outcomes[0]


def _start(line: CommandLine, rank: int, path: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(log, standard)
        os.chdir(path.parent)
        path.write_text(json.dumps(_train(line, rank)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)  # what the parent has open is not this process's to tidy up


def _train(line: CommandLine, rank: int) -> dict[str, Any]:
    """Steps and, where it raised, the error: its type, message, origin and whether in a step."""
    from megatron.training import training

    from megatron_dynmoe import pretrain

    steps, train_step = 0, training.train_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        outcome = train_step(*args, **kwargs)
        steps += 1
        return outcome

    training.train_step = counted
    world = str(line.num_ranks)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world}
    sys.argv = ["pretrain", *line.arguments]
    error: BaseException | None = None
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
        pretrain.main()
    except BaseException as raised:
        error = raised
        traceback.print_exception(error)
    result: dict[str, Any] = {"steps": steps}
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return result
    if isinstance(error, SystemExit) and isinstance(error.__context__, UsageError):
        refusal = {"error": "UsageError", "message": str(error.__context__), "origin": PACKAGE}
        return result | refusal | {"on_purpose": True, "in_step": False}
    walked = list(traceback.walk_tb(error.__traceback__))
    frames = [frame for frame, _ in walked]
    modules = [str(frame.f_globals.get("__name__")) for frame in frames]
    last_line = linecache.getline(frames[-1].f_code.co_filename, walked[-1][1])
    return result | {
        "error": type(error).__name__,
        "message": str(error) or "(no words)",
        # The innermost code that is upstream's or ours: torch raises for whoever called it.
        "origin": next(
            (name for name in reversed(modules) if name.split(".")[0] in (PACKAGE, "megatron")),
            modules[-1],
        ),
        "on_purpose": last_line.lstrip().startswith(("raise ", "assert ")),
        "in_step": any(frame.f_code.co_name == "train_step" for frame in frames),
    }


def _wait(children: dict[int, int]) -> bool:
    """Wait for all children; whether they had to be ended."""
    start, waiting = time.monotonic(), dict(children)
    first_end = math.inf
    while waiting:
        for child in list(waiting):
            if os.waitpid(child, os.WNOHANG)[0]:
                del waiting[child]
                first_end = min(first_end, time.monotonic())
        now = time.monotonic()
        if now > start + TIME_LIMIT or (waiting and now > first_end + GRACE + (first_end - start)):
            for child in waiting:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return len(waiting) == len(children)
        time.sleep(0.01)
    return False


def judge(line: CommandLine, result: dict[str, Any]) -> Outcome:
    error, steps = result.get("error"), result["steps"]
    if error is None:
        return Outcome("trained", f"{steps} steps")
    message = f"{error}: {result['message']}"
    if result["in_step"]:
        return Outcome("FAILED: in a step", message)
    if error == "SystemExit" and result["message"] in NOT_FINITE:
        return Outcome("refused by upstream", A_RESULT)
    if steps:
        return Outcome("FAILED: after a step", message)
    if result["origin"].split(".")[0] == PACKAGE:
        if error not in ("ValueError", "UsageError"):
            return Outcome(f"FAILED: {error} from {result['origin']}", message)
        if not _names_a_field(result["message"]):
            return Outcome("FAILED: names no flag", message)
        by_us = not result["message"].startswith("Megatron refuses")
        return Outcome("refused by us" if by_us else "refused by upstream", message)
    if error not in UPSTREAM_REFUSALS and not result["on_purpose"]:
        return Outcome(f"FAILED: {error} from {result['origin']}", message)
    return Outcome("refused by upstream", message)


def strictly(outcome: Outcome, line: CommandLine) -> Outcome:
    """The same, but a refusal has to be one line that names a flag of the command line."""
    if not outcome.kind.startswith("refused") or outcome.message == A_RESULT:
        return outcome
    if not outcome.message.startswith("UsageError"):
        return Outcome("FAILED: not in plain words", outcome.message)
    typed = {flag for flag, _ in line.flags}
    if "\n" in outcome.message or not typed & set(re.findall(r"--[\w-]*\w", outcome.message)):
        return Outcome("FAILED: names no flag that was typed", outcome.message)
    return outcome


def _names_a_field(message: str) -> bool:
    """Whether a message names a flag, or says of a setting what it is."""
    is_setting = rf"\b({'|'.join(SETTINGS)})\b'? (is|are|was|=)"
    return bool(re.search(r"--[a-z][a-z0-9-]+", message) or re.search(is_setting, message))


def parse(text: str) -> CommandLine:
    """The command line that :class:`CommandLine` prints."""
    words = shlex.split(text)
    num_ranks = int(words[words.index("--nproc-per-node") + 1])
    return CommandLine(num_ranks, tuple((word, None) for word in words[words.index("-m") + 2 :]))
