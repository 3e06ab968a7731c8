"""A mistake that is planted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        name: its name on the command line.
        mistake: what is wrong, for people.
        file: the file under megatron_dynmoe/ that gets the mistake.
        right: text that is in the file exactly once.
        wrong: the text that replaces it.
        tests: arguments of pytest.
    """

    name: str
    mistake: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    def fits(self, source: str) -> bool:
        return source.count(self.right) == 1

    def plant(self, source: str) -> str:
        return source.replace(self.right, self.wrong)
