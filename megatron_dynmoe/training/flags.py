"""The flags of the entry point: Megatron's and ours, in one parser."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron.training.arguments import add_megatron_arguments

from megatron_dynmoe.checkpoints import collective as checkpoints
from megatron_dynmoe.settings.arguments import (
    add_dynmoe_args,
)
from megatron_dynmoe.settings.messages.command_line import RaisingParser, UsageError
from megatron_dynmoe.settings.messages.words import text_of
from megatron_dynmoe.training import run_directory, signals
from megatron_dynmoe.training.checks.argument_checks import bound_numbers


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
    # argparse's own method does not say which file it cannot read.
    parser._read_args_from_files = partial(_with_files, parser)  # type: ignore[method-assign]
    parser.epilog = "example: dynmoe train $(dynmoe recipe smoke) --mock-data --run-dir runs/smoke"
    for add in (add_dynmoe_args, run_directory.add_flag, checkpoints.add_flags, signals.add_flag):
        parser = add(parser)
    return parser


def _with_files(parser: ArgumentParser, arg_strings: Sequence[str]) -> list[str]:
    """The words of a command line, with those of the file in place of each ``@FILE``."""
    words: list[str] = []
    for word in arg_strings:
        if not word.startswith("@"):
            words.append(word)
            continue
        try:
            lines = text_of(Path(word[1:])).splitlines()
        except OSError as error:
            parser.error(str(error))
        for number, line in enumerate(lines, start=1):
            place = f"{word}, line {number}"
            words += _with_files(parser, _words_of_line(line, place))
    return words


def _words_of_line(line: str, place: str) -> list[str]:
    """The flags in one line of an ``@FILE``, read as in a recipe."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise UsageError(f"{place}: {error} in {line.strip()!r}.") from None
    if words[:1] == ["include"]:
        raise UsageError(
            f"{place}: only recipes know {line.strip()!r}: give $(dynmoe recipe FILE) in place of "
            "@FILE."
        )
    return words
