"""Reading the words of a command line without a parser."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_dynmoe.settings.messages.command_line import UsageError


def values_of(flags: Sequence[str]) -> dict[str, list[str]]:
    """Collect the values of each flag by its name without leading dashes; the last one counts.

    ``["--lr", "1", "--bf16", "--lr=2"]`` gives ``{"lr": ["2"], "bf16": []}``.

    Raises:
        ValueError: there is a value before the first flag.
    """
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            current = values[name] = [value] if equals else []
        elif current is None:
            raise ValueError(
                f"{word!r} is no flag and stands before all flags: flags start with --."
            )
        else:
            current.append(word)
    return values


def whole_number(
    values: dict[str, list[str]], name: str, default: int | None = None, least: int = 1
) -> int:
    """Read the value of a flag that takes a whole number.

    Args:
        values: the values of all flags, from :func:`values_of`.
        name: the flag's name without leading dashes.
        default: the value if the flag is missing; None: the flag must be given.
        least: the smallest allowed value.

    Raises:
        ValueError: the flag is missing, has no value or several, or its value is no such number.
    """
    given = values.get(name)
    if given is None and default is not None:
        return default
    if given is None or len(given) != 1 or not given[0].isdecimal() or int(given[0]) < least:
        shown = "missing" if given is None else " ".join(given) or "without a value"
        raise ValueError(f"--{name} is {shown}: use a whole number from {least} up.")
    return int(given[0])


def text_of(path: Path) -> str:
    """The text of a file of flags. Bytes that are not UTF-8 stay as they are in the words.

    Raises:
        UsageError: the file is binary, or in UTF-16.
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    if b"\0" in content:
        raise UsageError(f"{path} is not a file of flags: it is binary, or in UTF-16.")
    return content.decode("utf-8", "surrogateescape")


def format_flags(flags: Sequence[str]) -> str:
    """Write flags as text, each on its own line with its values, quoted for a shell."""
    lines: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(word)
    return "\n".join(shlex.join(line) for line in lines)


def is_number(word: str) -> bool:
    """Whether a word is a number: in a blend of data sets, the weight of a file."""
    try:
        float(word)
    except ValueError:
        return False
    return True
