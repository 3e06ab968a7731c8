"""Recipes: files of flags in ``launch/recipes``.

    dynmoe recipe                          # lists the recipes
    dynmoe recipe dtop_p_16e [FLAGS ...]   # its flags, and yours after them
    dynmoe recipe --world-size 16 dtop_p_16e [FLAGS ...]    # checked first

A recipe holds flags as typed on the command line. ``#`` starts a comment. A line ``include FILE``
includes another file of the same folder. A later flag overrides an earlier one. Nothing here
imports torch.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.messages.words import text_of

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
FOLDER = LAUNCH / "recipes"
SUFFIX = ".flags"


def recipe_names() -> list[str]:
    """The names of the project's recipes; files that start with ``_`` are parts of others."""
    return sorted(path.stem for path in FOLDER.glob(f"[!_]*{SUFFIX}"))


def recipe_flags(name_or_path: str | Path) -> list[str]:
    """The words of a recipe after its includes are resolved.

    Args:
        name_or_path: a name from :func:`recipe_names`, the path of a ``.flags`` file, or ``@FILE``.

    Raises:
        UsageError: there is no such recipe, or the file is binary.
        ValueError: an include is missing or includes itself, or a line cannot be read.
    """
    return list(_words(_find(name_or_path), ()))


def command_words(recipe: str | Path, flags: Sequence[str]) -> list[str]:
    """The words of a recipe, and flags after them; both may be ``@FILE``, as for a training.

    Raises:
        ValueError: there is no such recipe or file, or a line cannot be read.
    """
    words = recipe_flags(recipe)
    for flag in flags:
        words += recipe_flags(flag) if flag.startswith("@") else [flag]
    return words


def describe(name: str) -> str:
    """The first comment line of a recipe."""
    first = _find(name).read_text().partition("\n")[0]
    return first.lstrip("# ")


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if text.startswith("@") or text.endswith(SUFFIX) or "/" in text:
        file = Path(text.removeprefix("@"))
        if not file.is_file():
            others = [other.name for other in file.parent.glob(f"*{SUFFIX}")]
            near = difflib.get_close_matches(file.name, others, n=1)
            hint = f" Did you mean {file.with_name(near[0])}?" if near else ""
            place = "" if file.is_absolute() else f" in {Path.cwd()}"
            raise UsageError(f"recipe is {text}, but there is no such file{place}.{hint}")
        return file
    path = FOLDER / f"{text}{SUFFIX}"
    if path.is_file():
        return path
    known = recipe_names()
    if not known:
        raise UsageError(
            f"recipe is {text!r}, but there is no folder {FOLDER}: recipes come with a checkout of "
            "the project; elsewhere give the path of a .flags file."
        )
    near = difflib.get_close_matches(text, known, n=1)
    hint = f"did you mean {near[0]}? Use" if near else "use"
    raise UsageError(
        f"recipe is {text!r}, which is unknown: {hint} one of {', '.join(known)}, or the path "
        f"of a {SUFFIX} file."
    )


def _words(path: Path, within: tuple[Path, ...]) -> Iterator[str]:
    path = path.resolve()
    if path in within:
        circle = " -> ".join(part.name for part in (*within[within.index(path) :], path))
        raise ValueError(f"recipe {within[0]} includes itself: {circle}. Take one include out.")
    for number, line in enumerate(text_of(path).splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error} in {line.strip()!r}.") from None
        if words[:1] == ["include"]:
            included = path.parent / "".join(words[1:2])
            if len(words) != 2 or not included.is_file():
                raise ValueError(
                    f"{path}, line {number}: {line.strip()!r} must name one file in {path.parent}."
                )
            yield from _words(included, (*within, path))
        else:
            yield from words
