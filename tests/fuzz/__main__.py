"""Tries random command lines: each trains two steps or is refused at start-up, by name.

    python -m tests.fuzz --cases 400 --seed 1      # make fuzz FUZZ=400
    python -m tests.fuzz --cases 200 --mistyped    # make fuzz FUZZ=200 MISTYPED=1
    python -m tests.fuzz --again 'torchrun ... -m megatron_dynmoe.pretrain ...'

Exit status 1 if any failed; each failure is printed with as few flags as it takes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
from hypothesis.strategies import SearchStrategy

from megatron_dynmoe.settings.messages.command_line import CommandParser
from tests.fuzz.command_lines import BASE, CommandLine, command_lines
from tests.fuzz.mistyped import mistyped
from tests.fuzz.trial import Outcome, attempt, parse, strictly

ATTEMPTS_TO_SHRINK = 40
Each = Callable[[CommandLine], None]


def main() -> int:
    """Run the trials and print what came of them."""
    parser = CommandParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument(
        "--mistyped",
        action="store_true",
        help="lines that train with one value mistyped; a refusal is one line that names a flag of "
        "the line, with exit code 2",
    )
    parser.add_argument("--again", metavar="COMMAND", help="one command line that was printed")
    parser.add_argument("--verbose", action="store_true", help="print every trial")
    args = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    from megatron_dynmoe.run import prepare

    prepare()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # each trial has a world of its own
        os.environ.pop(name, None)
    from tests.distributed.worker import warm_up

    warm_up([])
    with tempfile.TemporaryDirectory() as directory:
        if args.again:
            print(attempt(parse(args.again), Path(directory)), flush=True)
            return 0
        return _run(args, Path(directory))


def _run(args: argparse.Namespace, directory: Path) -> int:
    print(f"{args.cases} command lines, seed {args.seed}", flush=True)
    start, seen = time.monotonic(), Counter[str]()
    base = CommandLine(1, tuple(BASE.items())).arguments
    failures: dict[str, CommandLine] = {}

    def each(line: CommandLine) -> None:
        outcome = attempt(line, directory)
        if args.mistyped:
            outcome = strictly(outcome, line)
        seen[outcome.kind] += 1
        if args.verbose:
            changes = [word for word in line.arguments if word not in base]
            said = " ".join(outcome.message.split())[:160]
            print(f"{line.num_ranks}: {' '.join(changes)}\n    {outcome.kind}: {said}", flush=True)
        if outcome.failed and _signature(outcome) not in failures:
            smaller = line if args.mistyped else _shrink(line, outcome, directory)
            failures[_signature(outcome)] = smaller
            print(f"{outcome.kind}: {outcome.message.strip()[-600:]}\n  {smaller}", flush=True)

    if args.mistyped:
        for case in range(args.cases):
            each(mistyped(Random(f"{args.seed} {case}")))
    else:
        _draw(command_lines(), args, each)
    seconds = time.monotonic() - start
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(seen.items()))
    print(f"{sum(seen.values())} command lines in {seconds:.0f} s: {counts}")
    return 1 if failures else 0


def _draw(
    lines: SearchStrategy[Any], args: argparse.Namespace, each: Callable[[Any], None]
) -> None:
    settings = hypothesis.settings(
        max_examples=args.cases,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.seed(args.seed)(settings(hypothesis.given(lines)(each)))()


def _signature(outcome: Outcome) -> str:
    """One failure is printed once, whatever numbers are in its message."""
    return outcome.kind + "".join(c for c in outcome.message[:60] if not c.isdigit())


def _shrink(line: CommandLine, outcome: Outcome, directory: Path) -> CommandLine:
    """Take back what was changed, flag by flag, while it fails in the same way."""
    budget = ATTEMPTS_TO_SHRINK
    for flag, value in reversed(line.flags):
        if (flag in BASE and BASE[flag] == value) or not budget:
            continue
        budget -= 1
        flags = dict(line.flags)
        if flag in BASE:
            flags[flag] = BASE[flag]
        else:
            del flags[flag]
        smaller = CommandLine(line.num_ranks, tuple(flags.items()))
        if _signature(attempt(smaller, directory)) == _signature(outcome):
            line = smaller
    return line


if __name__ == "__main__":
    sys.exit(main())
