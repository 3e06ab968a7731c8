"""Prints the checks as a table on the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TextIO

from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check
from megatron_dynmoe.settings.messages.command_line import has_colors

SIGNS = {PASSED: "✓", WARNING: "!", FAILED: "✗"}
PLAIN_SIGNS = {PASSED: "+", WARNING: "!", FAILED: "x"}
COLORS = {PASSED: "\x1b[32m", WARNING: "\x1b[33m", FAILED: "\x1b[31m"}
RESET = "\x1b[0m"
MIN_WIDTH = 60


def write_table(checks: Sequence[Check], file: TextIO) -> None:
    """Write a line per check, with long ones wrapped, and each remedy below its check."""
    colored = has_colors(file)
    signs, arrow = (SIGNS, "→ ") if _can_write("✓✗→", file) else (PLAIN_SIGNS, "-> ")
    name_width = max(len(check.name) for check in checks)
    state_width = max(map(len, SIGNS)) + 2
    indent = " " * (2 + name_width + 2 + state_width + 2)
    width = max(MIN_WIDTH, shutil.get_terminal_size((100, 24)).columns) - len(indent)

    def lines(text: str, first: str = "") -> list[str]:
        later = " " * len(first)
        return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=later) or [""]

    print(f"  {'check':{name_width}}  {'state':{state_width}}  found, and what to do", file=file)
    for name, state, found, remedy in checks:
        shown = f"{signs[state]} {state}".ljust(state_width)
        shown = f"{COLORS[state]}{shown}{RESET}" if colored else shown
        first, *rest = lines(found)
        print(f"  {name:{name_width}}  {shown}  {first}".rstrip(), file=file)
        for line in rest + (lines(remedy, arrow) if remedy else []):
            print(indent + line, file=file)
    counts = {state: sum(check.state == state for check in checks) for state in SIGNS}
    warnings = "1 warning" if counts[WARNING] == 1 else f"{counts[WARNING]} warnings"
    print(f"\n  {counts[PASSED]} passed, {warnings}, {counts[FAILED]} failed", file=file)


def _can_write(text: str, file: TextIO) -> bool:
    try:
        text.encode(file.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
