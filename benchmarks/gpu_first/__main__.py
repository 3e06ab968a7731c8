"""The first minutes on a GPU: stages in the order of their value, until the time is used up.

    python -m benchmarks.gpu_first --output DIR [--minutes 8] [--rehearse]

stages.toml lists the stages, each a process of its own. After each, and every few seconds while one
runs, DIR holds summary.md, rows.csv and archive.tar.gz with everything. What is done is noted under
--state: the same command goes on with what is left. It imports nothing but the standard library, so
that a broken PyTorch is a line of the summary. Exit code: 0, also if the time was used up; 1 if a
stage has failed; 2 if nothing can run; 128 + the signal after one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu_first import stages
from benchmarks.gpu_first.call import Call
from benchmarks.gpu_first.state import ROOT
from megatron_dynmoe.settings.messages.command_line import CommandParser, number


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    try:
        table = stages.read(args.stages)
        if unknown := set(args.only) - {stage.name for stage in table}:
            names = ", ".join(stage.name for stage in table)
            parser.error(f"--only names no stage: {', '.join(sorted(unknown))}. There are {names}.")
        if args.list:
            for stage in table:
                print(f"{stage.name:20} {stage.seconds:4.0f} s at most  {stage.asks}")
            return
        sys.exit(Call(args, table).run())
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="gpu_first", description=__doc__.splitlines()[0])
    add, build = parser.add_argument, ROOT / "build"
    add("--output", type=Path, default=build / "gpu-first-output", help="default: %(default)s")
    add("--minutes", type=number(float, 0.1), default=8.0, help="in all (default: %(default)s)")
    add("--rehearse", action="store_true", help="on a CPU, at sizes of seconds")
    add("--only", nargs="*", default=[], metavar="STAGE", help="these, whether done or not")
    add("--list", action="store_true", help="list the stages and end")
    add("--state", type=Path, default=build / "gpu-first", help="what is done: %(default)s")
    add("--pack", type=Path, default=build / "gpu-pack", help="of make gpu-pack: %(default)s")
    add("--resume-from", type=Path, metavar="ARCHIVE", help="go on with an earlier call's")
    add("--any-code", action="store_true", help="even if its code or device is another one")
    add("--stages", type=Path, default=stages.TABLE, help="another table (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
