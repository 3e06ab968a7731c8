"""Errors about settings, which name a setting in the way in which the user gave it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from typing import Any


class SettingError(ValueError):
    """A setting that is wrong by itself or beside another one.

    ``str`` of the error names settings as Python and YAML do; :meth:`worded` can use other names.
    In ``problem`` and ``remedy`` the setting called ``name`` is written ``{name}``.

    Attributes:
        field: the setting's name.
        value: its value, None if it is not set.
        problem: what is wrong. It continues the sentence "field is value".
        remedy: what to do, or what is allowed.
    """

    def __init__(self, field: str, value: Any, problem: str, remedy: str) -> None:
        super().__init__(field, value, problem, remedy)
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy

    def worded(self, name_of: Callable[[str], str]) -> str:
        """Return the whole sentence; ``name_of`` gives the name of each setting in it."""
        rest = re.sub(r"\{(\w+)\}", lambda m: name_of(m[1]), f"{self.problem}: {self.remedy}.")
        return f"{name_of(self.field)} is {self._said()}{rest}"

    def _said(self) -> str:
        """Return the value as a message shows it."""
        if self.value is None:
            return "not set"
        return repr(self.value) if isinstance(self.value, str) else str(self.value)

    def __str__(self) -> str:
        return self.worded(lambda name: name)


class FlagError(SettingError):
    """A flag of Megatron's that is wrong by itself or beside another one.

    It is named as a flag everywhere: Megatron has no other way to set it. ``field`` is its name
    among Megatron's arguments.
    """

    def worded(self, name_of: Callable[[str], str]) -> str:
        return super().worded(lambda name: flag(name) if name == self.field else name_of(name))

    def _said(self) -> str:
        if self.value is None:
            return "not given"
        if self.value is True:
            return "given"
        if isinstance(self.value, list) and all(isinstance(word, str) for word in self.value):
            return " ".join(self.value)
        return str(self.value)


def flag(name: str) -> str:
    """The flag that sets one of Megatron's arguments, or what people call it if there is none."""
    return _WITHOUT_A_FLAG.get(name) or "--" + name.replace("_", "-")


_WITHOUT_A_FLAG = {"world_size": "the number of processes"}  # torchrun's --nproc-per-node and so on


class UnknownSettingError(SettingError):
    """A name that no setting has.

    Attributes:
        source: the place that the name comes from, such as a file.
        known: the names of all settings.
    """

    def __init__(self, field: Any, source: str, known: Collection[str]) -> None:
        super().__init__(field, None, "", "")
        self.source, self.known = source, known

    def worded(self, name_of: Callable[[str], str]) -> str:
        near = difflib.get_close_matches(str(self.field), self.known, n=1)
        known = ", ".join(name_of(name) for name in self.known)
        hint = f"did you mean {name_of(near[0])}?" if near else f"known are {known}."
        return f"{self.source}: there is no setting {self.field!r}; {hint}"


def in_few_words(error: Exception, num_lines: int = 3) -> str:
    """The first lines of another library's message, or the error's type if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:num_lines]) or type(error).__name__
