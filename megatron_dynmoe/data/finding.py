"""What a look at data, software or a machine has found."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

PASSED, WARNING, FAILED = "passed", "warning", "failed"


class Check(NamedTuple):
    """One line of the table.

    Attributes:
        name: what was looked at.
        state: ``passed``, ``warning`` (a run may work or be slow) or ``failed`` (it will not).
        found: what is there.
        remedy: what to do about it; empty where nothing is to do.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """The check's result; an error in it is a result, too."""
    try:
        return check()
    except ValueError as error:  # its message is for users
        return Check(name, FAILED, str(error))
    except Exception as error:
        return Check(name, FAILED, f"{type(error).__name__}: {error}")
