"""The methods of Megatron's classes that ours override."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check
from tests.upstream.contract import names, signatures


def methods() -> Iterator[tuple[str, Any, list[str]]]:
    """Each method of a class of ours that inherits from Megatron's: its name, itself, and the full
    names that it would have in these, from the nearest one on.

    Classes within functions are not found.
    """
    files = {file for users in names.imported().values() for file in users}
    for file in sorted(files):
        name = "megatron_dynmoe." + file.removesuffix(".py").replace("/", ".")
        module = importlib.import_module(name.removesuffix(".__init__"))
        for _, ours in inspect.getmembers(module, inspect.isclass):
            if ours.__module__ != module.__name__:
                continue
            theirs = [base for base in ours.__mro__ if base.__module__.startswith("megatron.")]
            for method, function in vars(ours).items():
                if theirs and inspect.isfunction(function):
                    bases = [f"{base.__module__}:{base.__qualname__}" for base in theirs]
                    yield f"{ours.__name__}.{method}", function, [f"{b}.{method}" for b in bases]


def compare(there: Path, supported: Path) -> Iterator[Check]:
    """Whether each method that overrides one of Megatron's still does, and takes the same."""
    num_same = 0
    for name, ours, full_names in methods():
        before = _first(supported, full_names)
        now = _first(there, full_names)
        if before is None and now is None:
            continue  # a method of ours alone
        if before is None:
            yield Check(name, FAILED, "Megatron has one of that name now", "give ours another name")
        elif now is None:
            yield Check(name, FAILED, "Megatron has none any more", "nothing may call ours")
        elif before == now:
            num_same += 1
        else:
            state = WARNING if signatures.accepts(ours, before, now) else FAILED
            says = f"Megatron's {signatures.difference(before, now)}"
            remedy = "ours goes along with it" if state == WARNING else "ours has to take the same"
            yield Check(name, state, says, remedy)
    yield Check("methods", PASSED, f"{num_same} that we override take what they took")


def _first(folder: Path, full_names: list[str]) -> str | None:
    found = (signatures.parameters(folder, full_name) for full_name in full_names)
    return next((parameters for parameters in found if parameters is not None), None)
