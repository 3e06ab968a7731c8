"""Flags, and types of flags, that more than one command has."""

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

DTYPES = ("auto", "float32", "bfloat16", "float16")
LARGEST = sys.float_info.max


def has_colors(file: TextIO) -> bool:
    """Whether to write colors: the file is a terminal, and no setting asks for plain text."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return file.isatty() and not is_plain


def number(kind: Callable[[str], Any], low: float, high: float = LARGEST) -> Callable[[str], Any]:
    """Make an argparse type: a number of ``kind`` (int or float) from ``low`` to ``high``."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:  # this is also true for NaN
            limits = f"{low} to {high}" if high < LARGEST else f"at least {low}"
            raise argparse.ArgumentTypeError(f"is {text}: use {limits}.")
        return value

    parse.__name__ = "number" if kind is float else "whole number"  # in argparse's own errors
    return parse


def thresholds(text: str) -> list[float]:
    """Parse an argparse value: thresholds to try, ``0.1,0.2``, in order; or ``none``."""
    if text == "none":
        return []
    values = sorted({float(part) for part in text.split(",")})
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"is {text}: use cumulative probabilities, 0 to 1.")
    return values


def budgets(text: str) -> list[float]:
    """Parse an argparse value: mean experts per token, ``1,1.5,2``, in order."""
    values = sorted({float(part) for part in text.split(",")})
    if not all(1 <= value < LARGEST for value in values):
        raise argparse.ArgumentTypeError(f"is {text}: use mean experts per token, from 1.")
    return values


thresholds.__name__ = budgets.__name__ = "list of numbers"


@contextmanager
def ending_plainly(prog: str, interrupted: str = "nothing was written") -> Iterator[None]:
    """End the process with one line after an error or a signal, as every command does.

    The exit code is 1 for an error, 2 for a UsageError, and 128 + signal for Ctrl-C and SIGTERM. A
    signal lets the block clean up first.

    Args:
        prog: the command's name.
        interrupted: the message if a signal ends the command.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        said = f"{prog}: error: {' '.join(str(error).split())}"
        if not isinstance(error, UsageError):
            sys.exit(said)
        print(said, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as told:
        print(f"{prog}: interrupted: {interrupted}", file=sys.stderr)
        sys.exit(128 + (told.args[0] if told.args else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt(number)


class UsageError(ValueError):
    """A command line that cannot work. It is reported in one line, with exit code 2."""


EXAMPLE = "example: "


class _HelpFormatter(argparse.HelpFormatter):
    """argparse's formatter, but an example stays on a line of its own, so that it can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        said, example, command = text.partition(EXAMPLE)
        filled = super()._fill_text(said, width, indent) if said.strip() else ""
        return "\n".join(part for part in (filled, f"{example}{command}") if part)


class CommandParser(argparse.ArgumentParser):
    """A parser that reports a misuse in one line on the screen, with exit code 2.

    argparse itself would print the whole usage before that line.
    """

    def __init__(self, *args: Any, example: str | None = None, **kwargs: Any) -> None:
        """Build the parser; ``example`` is a command line that ends its help."""
        kwargs = {"allow_abbrev": False, "formatter_class": _HelpFormatter, **kwargs}
        started = sys.argv[0]
        is_part = kwargs.get("prog", "").startswith(f"{started} ")  # such as `convert to-hf`
        if started.startswith("dynmoe ") and not is_part:  # so does the command of that name
            kwargs["prog"] = started
        super().__init__(*args, **kwargs)
        if example is not None:
            self.epilog = f"{self.epilog or ''}\n{EXAMPLE}{example}".lstrip()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and keep the words for :meth:`error`."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        self.exit(2, f"{self.prog}: error: {in_one_line(self, message, self._words)}\n")


class RaisingParser(argparse.ArgumentParser):
    """A parser that reports a misuse as a UsageError, which the caller shows."""

    def error(self, message: str) -> NoReturn:
        """Raise the UsageError."""
        raise UsageError(in_one_line(self, message, sys.argv[1:])) from None


def in_one_line(parser: argparse.ArgumentParser, message: str, words: Sequence[str] = ()) -> str:
    """Turn argparse's error into one line that names the flag and the remedy.

    argparse has only English sentences for its errors, so these are read here. If a Python words
    one in another way, the tests in ``tests/settings/test_command_line.py`` fail.

    Args:
        parser: the parser, which knows the flags.
        message: argparse's message.
        words: the command line. It may hold a missing flag in another spelling.
    """
    kind, _, rest = message.partition(": ")
    if kind == "unrecognized arguments":
        return _misspelled(rest.split(), _flags(parser, words)) or _left_over(parser, rest, words)
    if kind == "the following arguments are required":
        missing = set(rest.split(", "))
        return _in_other_letters(parser, words, missing) or f"required and not given: {rest}."
    if one_of := re.fullmatch(r"one of the arguments (.+) is required", message):
        missing = set(one_of[1].split())
        return _in_other_letters(parser, words, missing) or f"give {' or '.join(sorted(missing))}."
    if unread := re.fullmatch(r"\[Errno \d+\] (.+): '(.+)'", message):  # argparse's, of @FILE
        place = "" if os.path.isabs(unread[2]) else f" in {os.getcwd()}"
        return f"@{unread[2]} names a file of flags: {unread[1][0].lower()}{unread[1][1:]}{place}."
    if not message.startswith("argument "):
        return message
    flag, _, said = message.removeprefix("argument ").partition(": ")
    flag = flag.rpartition("/")[2]  # the last of several spellings
    if wrong := re.fullmatch(r"invalid (.+) value: (.*)", said, re.DOTALL):
        return f"{flag} is {wrong[2]}: give a {_KINDS.get(wrong[1], wrong[1])}."
    if wrong := re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", said, re.DOTALL):
        return f"{flag} is {wrong[1]}: use one of {wrong[2]}."
    if said.startswith("not allowed with argument "):
        return f"{flag} is {said.replace('argument ', '')}: give one of them."
    if said.startswith("expected "):
        return f"{flag} has another number of values: it {said.replace('expected', 'takes')}."
    if said.startswith("ignored explicit argument "):
        return f"{flag} takes no value: leave out {said.rpartition(' ')[2]}."
    return f"{flag} {said}" if said.startswith("is ") else f"{flag}: {said}"


_KINDS = {"int": "whole number", "float": "number"}


def _flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """Collect the flags of a parser and of the subcommand among the words."""
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in set(words) & set(action.choices):
                flags |= _flags(action.choices[name], words)
    return flags


def _misspelled(words: Sequence[str], flags: set[str]) -> str | None:
    """Name the first flag among the words that is not in ``flags``, and the closest one that is."""
    for word in words:
        name = word.partition("=")[0]
        if re.match("--?[A-Za-z]", name) and name not in flags:
            near = difflib.get_close_matches(name, sorted(flags), n=1)
            hint = f"did you mean {near[0]}?" if near else "look for it in --help."
            return f"there is no flag {name}: {hint}"
    return None


def _left_over(parser: argparse.ArgumentParser, rest: str, words: Sequence[str]) -> str:
    """Say that these words belong to no flag, and name the flag before them."""
    first = rest.split()[0]
    if parser.fromfile_prefix_chars == "@" and os.path.isfile(first):
        return f"{first} belongs to no flag: @{first} gives the flags that stand in this file."
    before = list(words)[: list(words).index(first)] if first in words else []
    flag = next((word for word in reversed(before) if word.startswith("--")), None)
    where = f": {flag} before it takes no more values" if flag else ""
    return f"{rest} belongs to no flag{where}."


def _in_other_letters(
    parser: argparse.ArgumentParser, words: Sequence[str], missing: set[str]
) -> str | None:
    known = _flags(parser, words)
    strange = [word for word in words if word.partition("=")[0] not in known]
    near = [word for word in strange if difflib.get_close_matches(word.partition("=")[0], missing)]
    return _misspelled(near, missing)


def add_budget_flag(parser: Any) -> None:
    """Add the flag that asks for a mean number of experts, to a parser or its group."""
    parser.add_argument(
        "--budget",
        type=number(float, 1),
        metavar="K",
        help="mean experts per token, by the model's budget_curve (dynmoe calibrate --budgets)",
    )


def add_runtime_flags(parser: Any) -> None:
    """Add the flags of every command that runs an exported model, to a parser or its group."""
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
