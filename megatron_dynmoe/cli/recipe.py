"""``dynmoe recipe``: lists recipes, prints one, and writes the scripts that launch them."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_dynmoe.jobs.recipes import LAUNCH, describe, recipe_flags, recipe_names
from megatron_dynmoe.settings.messages.command_line import CommandParser, UsageError, ending_plainly
from megatron_dynmoe.settings.messages.words import format_flags


def main(argv: Sequence[str] | None = None) -> None:
    """List, print, check or write, as the command line says."""
    parser = _parser()
    args = parser.parse_args(argv)
    with ending_plainly(parser.prog):
        if args.write_launch_scripts is not None:
            _write_launch_scripts(args.write_launch_scripts)
        elif args.recipe is None:
            names = recipe_names()
            for name in names:
                print(f"{name:<{max(map(len, names))}}  {describe(name)}")
        else:
            _show(args, parser)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="dynmoe recipe",
        usage="%(prog)s [options] [RECIPE [FLAGS ...]]",
        description="Lists recipes; with one, prints its flags.",
        example="dynmoe recipe --output my.flags dtop_p_16e --seed 7",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="check first that the flags fit a run of N processes, and that its data is there",
    )
    parser.add_argument(
        "--parse", action="store_true", help="parse the flags with Megatron, too (seconds)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the flags to a new file of flags"
    )
    parser.add_argument(
        "--write-launch-scripts",
        type=Path,
        metavar="DIR",
        help="write the scripts for one machine and for Slurm, and all recipes, to a new folder",
    )
    parser.add_argument("recipe", nargs="?", help="a name, or the path of a .flags file")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="more flags, which override it")
    return parser


def _show(args: argparse.Namespace, parser: CommandParser) -> None:
    try:
        flags = [*recipe_flags(args.recipe), *args.flags]
        if args.world_size is not None:
            from megatron_dynmoe.jobs.preflight import check_run

            check_run(flags, args.world_size)
        if args.parse:
            from megatron_dynmoe.jobs.parse import parse

            parse(flags)
    except ValueError as error:
        if args.world_size is not None:  # as launch scripts call it, whose user knows only them
            parser.exit(2, f"error: {error}\n")
        raise UsageError(str(error)) from error
    if args.output is None:
        print(format_flags(flags))
        return
    if args.output.exists():
        raise UsageError(f"--output is {args.output}, which is there already: name a new file.")
    args.output.write_text(f"# From the recipe {args.recipe}.\n{format_flags(flags)}\n")
    print(f"written: {args.output}\nto train with it: launch/local.sh {args.output}")


def _write_launch_scripts(folder: Path) -> None:
    if folder.exists():
        raise UsageError(
            f"--write-launch-scripts is {folder}, which is there already: name a new folder."
        )
    shutil.copytree(LAUNCH, folder, ignore=shutil.ignore_patterns("__pycache__", "cluster.env"))
    print(f"written: {folder}; {folder / 'README.md'} says how to use it")
