"""Flags of every command that reads text."""

import argparse
from typing import Any

from megatron_dynmoe.data.records import DEFAULT_LIMITS
from megatron_dynmoe.settings.command_line import number


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """Add which files are read, how, and whether the output may be replaced."""
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
    """Add the name of the text's field, Megatron's and the one it had here, to a parser or group.

    Args:
        several: it takes any number of names, one data set each, and is a list of them.
    """
    form: dict[str, Any] = {"metavar": "KEY", "dest": "json_keys"}
    form |= {"nargs": "+", "default": ["text"]} if several else {"default": "text"}
    what = (
        "fields (Parquet: columns) that hold" if several else "field (Parquet: column) that holds"
    )
    parser.add_argument("--json-keys", help=f"{what} text (default: text)", **form)
    parser.add_argument("--text-key", help=argparse.SUPPRESS, **form)


def add_reading_flags(parser: Any) -> None:
    """Add what every command that reads text has, to a parser or a group of one."""
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
