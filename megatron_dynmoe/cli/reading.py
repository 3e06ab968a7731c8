"""Flags that all commands that read text have."""

import argparse
from typing import Any

from megatron_dynmoe.data.text.records import DEFAULT_LIMITS
from megatron_dynmoe.settings.messages.command_line import number


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for which files are read, how, and whether the output may be replaced."""
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="files, folders or quoted globs: JSON lines or .txt (plain, .gz, .zst), or .parquet",
    )
    add_key_flag(parser, several=True)
    add_reading_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def add_key_flag(parser: Any, *, several: bool = False) -> None:
    """Add the flag for the name of the text field; it has Megatron's name, and its old one here.

    Args:
        parser: a parser, or a group of one.
        several: whether the flag takes a list of names, one per dataset.
    """
    form: dict[str, Any] = {"metavar": "KEY", "dest": "json_keys"}
    form |= {"nargs": "+", "default": ["text"]} if several else {"default": "text"}
    what = (
        "fields (Parquet: columns) that hold" if several else "field (Parquet: column) that holds"
    )
    parser.add_argument("--json-keys", help=f"{what} text (default: text)", **form)
    parser.add_argument("--text-key", help=argparse.SUPPRESS, **form)


def add_reading_flags(parser: Any) -> None:
    """Add the flags that every command that reads text has, to a parser or an argument group."""
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at an unreadable record: stop with its file and line (default), or skip and count it",
    )
    parser.add_argument(
        "--max-line-bytes",
        type=number(int, 1),
        default=DEFAULT_LIMITS.line_bytes,
        metavar="N",
        help="a longer line (Parquet: text) is unreadable (default: %(default)s)",
    )
    parser.add_argument(
        "--max-expansion",
        type=number(int, 1),
        default=DEFAULT_LIMITS.expansion,
        metavar="N",
        help="a compressed file that becomes more than N times as large stops the run "
        "(default: %(default)s)",
    )
