"""Flags, and types of flags, that more than one command has."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

DTYPES = ("auto", "float32", "bfloat16", "float16")
LARGEST = sys.float_info.max


def has_colors(file: TextIO) -> bool:
    """Whether to color what is written there: a terminal that can, and no wish for plain text."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return file.isatty() and not is_plain


def number(kind: Callable[[str], Any], low: float, high: float = LARGEST) -> Callable[[str], Any]:
    """An argparse type: a number of ``kind`` (int or float) from ``low`` to ``high``."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            limits = f"{low} to {high}" if high < LARGEST else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text}: use {limits}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"  # in argparse's own errors
    return parse


def thresholds(text: str) -> list[float]:
    """An argparse type: thresholds to try, ``0.1,0.2``, in order; or ``none``."""
    if text == "none":
        return []
    values = sorted({float(part) for part in text.split(",")})
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: thresholds are cumulative probabilities, 0 to 1")
    return values


thresholds.__name__ = "list of numbers"


def in_one_line(parser: argparse.ArgumentParser, message: str) -> str:
    """What argparse finds wrong, with the flag that was probably meant."""
    kind, _, words = message.partition(": ")
    if kind != "unrecognized arguments":
        return message.replace("argument ", "", 1)
    for word in words.split():
        if word.startswith("--"):
            name = word.partition("=")[0]
            near = difflib.get_close_matches(name, parser._option_string_actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "look for it in --help."
            return f"there is no flag {name}: {hint}"
    return f"{words} belongs to no flag: take it out."


def add_runtime_flags(parser: Any) -> None:
    """Add what every command that runs an exported model has, to a parser or a group of one."""
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
