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


def accepts(ours: Callable[..., Any], before: str, now: str) -> bool:
    """Whether what takes a function's place goes along with the function's new parameters.

    It does if it passes on whatever it gets, or if all that changed are parameters that it has.
    """
    own = inspect.signature(ours, follow_wrapped=False).parameters.values()
    kinds = {parameter.kind for parameter in own}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
        return True
    old, new = _names(before), _names(now)
    added = [name for name in new if name not in old]
    kept = [name for name in new if name in old]
    takes_any_name = inspect.Parameter.VAR_KEYWORD in kinds
    return kept == old and (takes_any_name or {*added} <= {parameter.name for parameter in own})


def _names(parameters: str) -> list[str]:
    arguments = ast.parse(f"def f({parameters}): pass").body[0]
    return [node.arg for node in ast.walk(arguments) if isinstance(node, ast.arg)]
