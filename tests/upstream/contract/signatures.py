"""What functions of a Megatron take, read from its files, so that nothing has to be imported."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parameters(folder: Path, full_name: str) -> str | None:
    """The parameters of a function, or of a class's ``__init__``, without annotations.

    Args:
        folder: holds the folder ``megatron``.
        full_name: ``module:function`` or ``module:Class.method``.

    Returns:
        None if there is no such definition, which may be an assignment.
    """
    module, _, path = full_name.partition(":")
    first, *rest = path.split(".")
    for node in _statements(folder, module):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                if (name.asname or name.name) == first and node.module:
                    parts = module.split(".")[: -node.level] if node.level else []
                    origin = ".".join([*parts, node.module])
                    return parameters(folder, f"{origin}:{'.'.join([name.name, *rest])}")
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == first:
            return _of(node, rest)
    return None


@functools.cache
def _statements(folder: Path, module: str) -> tuple[ast.stmt, ...]:
    base = folder.joinpath(*module.split("."))
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.exists():
            return tuple(ast.parse(file.read_text(encoding="utf-8")).body)
    return ()


def _of(node: ast.FunctionDef | ast.ClassDef, rest: list[str]) -> str | None:
    if isinstance(node, ast.ClassDef):
        wanted, *rest = rest or ["__init__"]
        inner = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == wanted]
        return _of(inner[-1], rest) if inner else None
    arguments = node.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


def difference(before: str, now: str) -> str:
    """What a function takes now and did not, and the other way round."""
    old, new = _names(before), _names(now)
    parts = [f"takes no {name} any more" for name in old if name not in new]
    parts += [f"takes {name}, too" for name in new if name not in old]
    return " and ".join(parts) or f"takes ({now}), and took ({before})"


def accepts(ours: Callable[..., Any], before: str, now: str) -> bool:
    """Whether what takes a function's place goes along with the function's new parameters.

    It does if it passes on whatever it gets. Otherwise it has to have each new parameter, and must
    not want one that is gone; the others have to stand in the order in which they stood.
    """
    own = inspect.signature(ours, follow_wrapped=False).parameters
    kinds = {parameter.kind for parameter in own.values()}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
        return True
    old, new = _names(before), _names(now)
    if [name for name in old if name in new] != [name for name in new if name in old]:
        return False
    has_all = inspect.Parameter.VAR_KEYWORD in kinds or {*new} - {*old} <= own.keys()
    wanted = {name for name, parameter in own.items() if parameter.default is parameter.empty}
    return has_all and not wanted & ({*old} - {*new})


def _names(parameters: str) -> list[str]:
    arguments = ast.parse(f"def f({parameters}): pass").body[0]
    return [node.arg for node in ast.walk(arguments) if isinstance(node, ast.arg)]
