"""Types of flags that more than one command has."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

LARGEST = sys.float_info.max


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
