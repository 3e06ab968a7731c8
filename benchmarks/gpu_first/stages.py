"""The table of stages, read from a TOML file and filled in."""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("stages.toml")
FOR_ROUNDS = 0.4  # of a stage's seconds; the rest is for imports, compilation and memory


@dataclass(frozen=True)
class Stage:
    """One process of the first minutes; stages.toml says what its fields mean."""

    name: str
    asks: str
    command: str
    seconds: float
    least: float
    gpu: str = ""
    rehearsal: str = ""
    writes: str = ""
    kernels: int | str | None = None
    needs: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What its rows are of: the part of its name before a hyphen."""
        return self.name.partition("-")[0]

    def words(self, rehearses: bool, seconds: float, **paths: str | Path) -> list[str]:
        """The command line.

        Args:
            rehearses: whether it runs on a CPU.
            seconds: its limit this time.
            paths: the values of {python}, {folder}, and so on.
        """
        line = f"{self.command} {self.rehearsal if rehearses else self.gpu}"
        values = {**paths, "budget": f"{FOR_ROUNDS * seconds:.0f}"}
        return [_filled(word, values) for word in shlex.split(line)]


def read(path: Path = TABLE) -> list[Stage]:
    """Read the table.

    Raises:
        ValueError: it is none, or a stage has a field too few or too many.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return [_stage(entry, table.get("words", {})) for entry in table["stage"]]
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"stages {path}: {error}") from error


def _stage(entry: dict[str, Any], words: dict[str, str]) -> Stage:
    known = {field.name for field in fields(Stage)}
    if unknown := entry.keys() - known:
        raise KeyError(f"{entry.get('name')} has {', '.join(sorted(unknown))}")
    filled = {
        key: _filled(value, words) if key in ("command", "gpu", "rehearsal") else value
        for key, value in entry.items()
    }
    return Stage(**filled | {"needs": tuple(entry.get("needs", ()))})


def _filled(text: str, values: dict[str, Any]) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text
