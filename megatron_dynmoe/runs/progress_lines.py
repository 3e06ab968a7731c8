"""Shortens Megatron's log to what a person watches: one line per log interval and evaluation.

The lines that our package prints at the start and at the end of a run stay as they are.
"""

from __future__ import annotations

import re
import sys

_ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) \|")
_SAID = re.compile(r"> (note|warning|finished|stopped[^:]*): |WARNING: --")
# Each has the name and the value; after the experts comes what the controller moves, if anything.
_FIELDS = (
    re.compile(r"\blm (loss): (\S+)"),
    re.compile(r"(experts per token): ([\d.]+(?: \(target \S+\))?)"),
    re.compile(r"experts per token: [^|]*\| (\w+): (\S+)"),
    re.compile(r"(tokens/s): (\S+)"),
)
_MILLISECONDS = re.compile(r"elapsed time per iteration \(ms\): (\S+)")
_VALIDATION = re.compile(
    r"validation loss at (iteration \d+)(?: on (\w+) set)? \|.*lm loss value: (\S+)"
)


def shorten(line: str) -> str | None:
    """The short form of a line of Megatron's log, or None if the line is left out."""
    if _SAID.match(line):
        return line.rstrip()
    if match := _VALIDATION.search(line):
        where = f"at the end, {match[2]} set" if match[2] else f"validation at {match[1]}"
        return f"  {where}: loss {float(match[3]):.3f}"
    if (match := _ITERATION.search(line)) is None:
        return None
    done, total = int(match[1]), int(match[2])
    parts = [f"  step {done:>{len(str(total))}}/{total}"]
    for pattern in _FIELDS:
        if found := pattern.search(line):
            name, value = found.groups()
            parts.append(f"{name} {float(value):.3f}" if name == "loss" else f"{name} {value}")
    if found := _MILLISECONDS.search(line):
        minutes, seconds = divmod(round((total - done) * float(found[1]) / 1000), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return " | ".join(parts)


def progress_of(line: str) -> int | None:
    """The step that a line of Megatron's log reports as done, or None for any other line."""
    match = _ITERATION.search(line)
    return int(match[1]) if match else None


def main() -> None:
    """Read stdin and print short lines as they come."""
    for line in sys.stdin:
        if short := shorten(line):
            print(short, flush=True)
