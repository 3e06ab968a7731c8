"""JSON that means what it says: one value a name, no NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON; numbers so that they are read back exactly."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", "utf-8")


def measured_json(content: Any) -> str:
    """Readable JSON of measurements; null for those that are no number JSON has (NaN, infinity)."""
    return json.dumps(_measured(content), indent=2, allow_nan=False) + "\n"


def _measured(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _measured(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_measured(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing or holds something else, such as a name twice.
    """
    try:
        content = json.loads(
            path.read_text("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of names and values")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
