"""The flags of the entry point: Megatron's and ours, in one parser."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from functools import partial

from megatron.training.arguments import add_megatron_arguments

from megatron_dynmoe.checkpoints import collective as checkpoints
from megatron_dynmoe.settings.arguments import (
    add_dynmoe_args,
)
from megatron_dynmoe.settings.command_line import RaisingParser, UsageError
from megatron_dynmoe.training import run_directory, signals
from megatron_dynmoe.training.argument_checks import bound_numbers


def training_parser() -> ArgumentParser:
    """The parser of every command that reads a training's flags; a refusal is a UsageError."""
    return add_flags(add_megatron_arguments(RaisingParser(allow_abbrev=False)))


def add_flags(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of this entry point to Megatron's, and ``@FILE`` for flags in a file."""
    # One of upstream's help texts holds a bare "%", on which argparse's --help fails.
    for action in parser._actions:
        action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help or "")
    # Our method replaces argparse's, which prints 1,500 lines of usage before the error.
    parser.error = partial(RaisingParser.error, parser)  # type: ignore[method-assign, arg-type]
    bound_numbers(parser)
    parser.fromfile_prefix_chars = "@"
    parser.epilog = "example: dynmoe train $(dynmoe recipe smoke) --mock-data --run-dir runs/smoke"
    parser.convert_arg_line_to_args = _words_of_line  # type: ignore[method-assign]
    for add in (add_dynmoe_args, run_directory.add_flag, checkpoints.add_flags, signals.add_flag):
        parser = add(parser)
    return parser


def _words_of_line(arg_line: str) -> list[str]:
    """The flags in one line of an ``@FILE``, read as in a recipe."""
    try:
        words = shlex.split(arg_line, comments=True)
    except ValueError as error:
        raise UsageError(f"the @FILE has a line with {error}: {arg_line.strip()!r}.") from None
    if words[:1] == ["include"]:
        raise UsageError(
            f"the @FILE has the line {arg_line.strip()!r}, which only recipes know: give "
            "$(dynmoe recipe FILE) in place of @FILE."
        )
    return words
