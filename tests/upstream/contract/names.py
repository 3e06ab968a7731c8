"""The names of Megatron that this package imports, and placeholders for those that are gone.

A module that is gone would keep the table of patches from being imported, and so hide what the
other rows find. A placeholder takes its place in the process that probes, which trains nothing.
"""

from __future__ import annotations

import ast
import importlib
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_dynmoe

PACKAGE = Path(megatron_dynmoe.__file__).parent


class Missing:
    """Stands where a name was expected."""


class Placeholder(types.ModuleType):
    """Stands where a module was expected, and has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing


def imported() -> dict[tuple[str, str], list[str]]:
    """Module and name (empty for the module itself) of each import, with the files that do it.

    Those for types alone, which no run imports, are left out.
    """
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        place = str(path.relative_to(PACKAGE))
        for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[tuple[str, str]] = []
            if isinstance(node, ast.Import):
                names = [(name.name, "") for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [(node.module, name.name) for name in node.names]
            for module, name in names:
                if module.partition(".")[0] == "megatron" and place not in found[module, name]:
                    found[module, name].append(place)
    return dict(found)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from _statements(child)


def load(module: str) -> tuple[types.ModuleType, dict[str, str]]:
    """Import a module of Megatron's, with placeholders for what cannot be imported.

    Returns:
        The module, or its placeholder; what each module in the way of it raised, by name.
    """
    errors: dict[str, str] = {}
    while True:
        try:
            return importlib.import_module(module), errors
        except BaseException as error:  # a module may raise anything, SystemExit included
            culprit = _raised_in(error, module)
            if isinstance(sys.modules.get(culprit), Placeholder) or isinstance(
                error, KeyboardInterrupt
            ):
                raise
            if not isinstance(sys.modules.get(culprit.rpartition(".")[0]), Placeholder):
                errors[culprit] = f"{type(error).__name__}: {error}"
            _put_placeholder(culprit)


def _raised_in(error: BaseException, module: str) -> str:
    """The module of Megatron's whose own lines, as it was imported, raised the error."""
    found, trace = module, error.__traceback__
    if isinstance(error, ModuleNotFoundError) and f"{error.name}".startswith("megatron."):
        return str(error.name)
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if trace.tb_frame.f_code.co_name == "<module>" and name.startswith("megatron."):
            found = name
        trace = trace.tb_next
    return found


def _put_placeholder(name: str) -> None:
    sys.modules[name] = module = Placeholder(name)
    module.__path__ = []  # a package, in case one of its modules is wanted
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)


def look(module: types.ModuleType, name: str) -> Any:
    """A name of a module, which may be a module itself; ``Missing``, set there, if it is gone."""
    if not hasattr(module, name):
        try:
            return importlib.import_module(f"{module.__name__}.{name}")
        except Exception:  # whatever another version raises, its name cannot be had
            setattr(module, name, Missing)
    return getattr(module, name)
