"""The result of a check of data, software or a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

PASSED, WARNING, FAILED = "passed", "warning", "failed"


class Check(NamedTuple):
    """One line of the table.

    Attributes:
        name: what was checked.
        state: ``passed``, ``warning`` (a run may work or be slow) or ``failed`` (it will not).
        found: what the check found.
        remedy: what to do about it; empty if there is nothing to do.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """Run a check; if it raises an error, that is its result, too."""
    try:
        return check()
    except ValueError as error:  # its message is for users
        return Check(name, FAILED, str(error))
    except Exception as error:
        return Check(name, FAILED, f"{type(error).__name__}: {error}")
