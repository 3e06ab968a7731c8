"""``dynmoe attempt``: the command that launch scripts call before and after a job."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dynmoe.jobs.attempts import ALREADY_FINISHED, begin, end
from megatron_dynmoe.settings.messages.command_line import CommandParser


def main(argv: Sequence[str] | None = None) -> None:
    """Begin or end an attempt, with exit codes of :mod:`megatron_dynmoe.jobs.attempts`."""
    parser = CommandParser(
        prog="dynmoe attempt",
        description="Begin or end a job's attempt at a run, for launch scripts of your own; begin "
        "prints the attempt's folder, whose flags.txt holds the flags to train with.",
        example="dynmoe attempt begin --world-size 2 smoke --run-dir runs/mine",
    )
    commands = parser.add_subparsers(required=True, dest="command")
    start = commands.add_parser("begin")
    start.add_argument("--world-size", type=int, required=True)
    start.add_argument("--max-restarts", type=int, default=2)
    start.add_argument("recipe")
    start.add_argument("flags", nargs=argparse.REMAINDER)
    finish = commands.add_parser("end")
    finish.add_argument("attempt", type=Path)
    finish.add_argument("--status", type=int, required=True)
    finish.add_argument("--stopped", action="store_true")
    args = parser.parse_args(argv)
    if args.command == "end":
        sys.exit(end(args.attempt, args.status, args.stopped))
    try:
        attempt = begin(args.recipe, args.flags, args.world_size, args.max_restarts)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    if attempt is None:
        sys.exit(ALREADY_FINISHED)
    print(attempt)
