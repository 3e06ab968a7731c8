"""Commands, called in the test's own process."""

import sys
from collections.abc import Callable, Sequence
from typing import Any


def exit_code_of(main: Callable[[Sequence[str]], Any], words: Sequence[str]) -> int:
    """What the shell would see of a command; what Python would write of its end is on stderr."""
    try:
        return main(words) or 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
