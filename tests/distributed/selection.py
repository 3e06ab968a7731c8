"""Which cases the selected tests can ask for, read from their code and parameters.

So a case runs only if one of its tests does: `-k`, `-m "not long"` and a single test's name choose
cases, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import pytest

from tests.distributed import harness
from tests.distributed.harness import Case


def cases_of(tests: Iterable[pytest.Item]) -> set[str]:
    """Names of the cases among the tests' parameters, and among the globals that they name.

    Also among those that their fixtures and the functions that they call name, if these are tests'
    code. Of a dictionary in which a parameter is a key, only that value counts; so what a test asks
    of a dictionary by a constant had better have a name of its own.
    """
    return {case.name for test in tests if isinstance(test, pytest.Function) for case in _of(test)}


def _of(test: pytest.Function) -> Iterator[Case]:
    parameters = [*test.callspec.params.values()] if hasattr(test, "callspec") else []
    fixtures = [
        definition.func
        for definitions in test._fixtureinfo.name2fixturedefs.values()
        for definition in definitions
    ]
    yield from _in([*parameters, test.function, *fixtures], parameters, set())


def _in(value: Any, parameters: list[Any], seen: set[int]) -> Iterator[Case]:
    """The cases in a value."""
    if isinstance(value, Case):
        yield value
    elif isinstance(value, FunctionType):
        ours = value.__module__.startswith("tests.") and value.__module__ != harness.__name__
        if id(value) in seen or not ours:  # the harness knows all cases
            return
        seen.add(id(value))
        for name in _names(value.__code__):
            yield from _in(value.__globals__.get(name), parameters, seen)
    elif isinstance(value, Mapping):
        asked = [key for key in value if key in parameters]
        for key in asked or value:
            yield from _in([key, value[key]], parameters, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for one in value:
            yield from _in(one, parameters, seen)


def _names(code: CodeType) -> set[str]:
    """The globals of a function and of those inside it."""
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def matrix(values: Iterable[Any], quick: Collection[str]) -> list[Any]:
    """Parameters that try one thing in several layouts; those not named by ``quick`` are long.

    Args:
        values: cases, names, or tuples whose last case names them.
        quick: names of at least one of each kind.
    """
    named = {_name(value): value for value in values}
    assert {*quick} <= named.keys(), f"{ {*quick} - named.keys() } are not in the matrix"
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if name in quick else [pytest.mark.long],
            id=name,
        )
        for name, value in named.items()
    ]


def _name(value: Any) -> str:
    if isinstance(value, tuple):
        return next(one.name for one in reversed(value) if isinstance(one, Case))
    return value.name if isinstance(value, Case) else value
