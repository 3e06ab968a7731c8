"""Looks at another Megatron in a process that trains nothing: names, settings, patches, overrides.

Run as a module it is that process; :func:`probe` starts it and reads what it prints.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check
from tests.upstream.contract import names, signatures
from tests.upstream.contract.place import Place, installed

MARK = "try-megatron: "
PATIENCE = 600  # seconds for all of it; a cold disk takes 60


def names_that_we_import() -> Iterator[Check]:
    """Every name of Megatron's that a module of the package imports."""
    from megatron_dynmoe.backends import cpu

    cpu.install()
    wanted, num_gone = names.imported(), 0
    modules = {module: names.load(module) for module in dict.fromkeys(m for m, _ in wanted)}
    for module, (loaded, errors) in modules.items():
        users = sorted({user for (m, _), found in wanted.items() if m == module for user in found})
        for culprit, error in errors.items():
            num_gone += 1
            says = f"{culprit} cannot be imported: {error}"
            yield Check(_last(culprit), FAILED, says, f"needed by {', '.join(users)}")
        for (owner, name), users in wanted.items():
            if owner != module or not name or isinstance(loaded, names.Placeholder):
                continue
            if names.look(loaded, name) is names.Missing:
                num_gone += 1
                yield Check(name, FAILED, f"{module} has none", f"needed by {', '.join(users)}")
    if not num_gone:
        yield Check("imports", PASSED, f"{len(wanted)} names of {len(modules)} modules are there")


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def settings() -> Iterator[Check]:
    """Every MoE setting of upstream has a row in our table, and its default is allowed."""
    from megatron_dynmoe.settings.upstream_flags import (
        UNRELEASED,
        UPSTREAM_FLAGS,
        check_upstream_settings,
    )
    from tests.upstream import settings as upstreams

    found: dict[str, dict[str, Any]] = {"flags": {}, "fields": {}}
    for kind, read in (("flags", upstreams.flags), ("fields", upstreams.fields)):
        try:
            found[kind] = read()
            check_upstream_settings(Namespace(**found[kind]))
            num = len(UPSTREAM_FLAGS.keys() & found[kind].keys())
            yield Check(f"{kind} we know", PASSED, f"{num}, with defaults that we allow")
        except ValueError as error:
            yield Check(f"{kind} we know", FAILED, str(error), "allow upstream's default")
        except BaseException as error:
            yield Check(f"{kind} we know", FAILED, f"{type(error).__name__}: {error}")
    every, known = found["flags"] | found["fields"], UPSTREAM_FLAGS.keys() - UNRELEASED.keys()
    for name in sorted(upstreams.unknown(**found)):
        remedy = "give it a row in settings/upstream_flags.py"
        yield Check(name, FAILED, f"is new, {every[name]!r} by default", remedy)
    if all(found.values()) and (gone := sorted(known - every.keys())):
        yield Check("rows without a setting", WARNING, f"upstream has no {', '.join(gone)}")


def patches() -> Iterator[Check]:
    """Each row of the table: its functions are there, take what they took, and are still needed."""
    from megatron_dynmoe.upstream.patches import PATCHES, watching

    there, supported = map(Path, sys.argv[1:3])
    for patch in (*PATCHES, watching(*[lambda found: found] * 5)):
        try:
            yield _patch(patch, there, supported)
        except BaseException as error:
            yield Check(patch.name, FAILED, f"{type(error).__name__}: {error}", patch.reason)


def _patch(patch: Any, there: Path, supported: Path) -> Check:
    from megatron_dynmoe.upstream.patch import _find

    gone, changed, refused = [], [], []
    for full_name in patch.wraps:
        try:
            owner, name = _find(full_name)
            found = getattr(owner, name, names.Missing)
        except (ImportError, AttributeError) as error:
            gone.append(f"{full_name} is gone ({error})")
            continue
        if found is names.Missing or owner is names.Missing:
            gone.append(f"{full_name} is gone")
    if gone:
        return Check(patch.name, FAILED, "; ".join(gone), f"it ends when: {patch.ends}")
    is_applied = patch.applies()
    patch.apply()
    for full_name in patch.wraps:
        before = signatures.parameters(supported, full_name)
        now = signatures.parameters(there, full_name)
        if before == now:
            continue
        owner, name = _find(full_name)
        ours = getattr(owner, name)
        if before is None or now is None:
            refused.append(f"{full_name} is no function that is defined there")
        elif is_applied and not signatures.accepts(ours, before, now):
            refused.append(f"{full_name} {signatures.difference(before, now)}")
        else:
            changed.append(f"{full_name} {signatures.difference(before, now)}")
    if refused:
        return Check(patch.name, FAILED, "; ".join(refused), "ours has to take the same")
    needed = _still_needed(patch.name)
    if needed is not None:
        return needed
    if changed:
        return Check(patch.name, WARNING, "; ".join(changed), "ours goes along with it")
    return Check(patch.name, PASSED, "applies" if is_applied else "not for this machine")


def _still_needed(name: str) -> Check | None:
    """What the row's own test says, if it does not pass."""
    from tests.upstream.test_patches import STILL_NEEDED

    with tempfile.TemporaryDirectory() as folder:
        try:
            if name not in STILL_NEEDED or STILL_NEEDED[name](Path(folder)):
                return None
        except BaseException as error:
            says = f"its test fails: {type(error).__name__}: {error}"
            return Check(name, FAILED, says, "see STILL_NEEDED in tests/upstream/test_patches.py")
    return Check(name, WARNING, "is no longer needed", "remove it when only this Megatron is meant")


def overrides() -> Iterator[Check]:
    """Each method of ours that overrides one of Megatron's still does."""
    from tests.upstream.contract.overrides import compare

    return compare(*map(Path, sys.argv[1:3]))


PROBES = {
    "names": names_that_we_import,
    "settings": settings,
    "patches": patches,
    "overrides": overrides,
}


def probe(
    parts: Sequence[str], variables: Mapping[str, str], there: Place
) -> dict[str, list[Check]]:
    """Run some of the probes in one process of that environment."""
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    command += [str(there.folder), str(installed()), *parts]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, env=dict(variables), timeout=PATIENCE
        )
        output = child.stdout
        last = (child.stderr.strip().splitlines() or ["without a word"])[-1]
        end = f"the process ended with {child.returncode}: {last}"
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace")
        end = f"no answer within {PATIENCE} s"
    found: dict[str, list[Check]] = {part: [] for part in parts}
    done = set()
    for line in output.splitlines():
        if line.startswith(MARK):
            part, *check = json.loads(line.removeprefix(MARK))
            if check:
                found[part].append(Check(*check))
            else:
                done.add(part)
    for part in parts:
        if part not in done:
            found[part].append(Check("the probe itself", FAILED, end))
    return found


def main() -> None:
    for part in sys.argv[3:]:
        if part != "names":
            list(names_that_we_import())  # whose placeholders the others need
        try:
            for check in PROBES[part]():
                print(MARK + json.dumps([part, *check]), flush=True)
        except BaseException as error:
            check = Check(part, FAILED, f"{type(error).__name__}: {error}")
            print(MARK + json.dumps([part, *check]), flush=True)
        print(MARK + json.dumps([part]), flush=True)


if __name__ == "__main__":
    main()
