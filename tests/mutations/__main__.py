"""Plants known mistakes in a copy of the package, one at a time, and checks whether tests fail.

    python -m tests.mutations                     # all, each against the tests that should catch it
    python -m tests.mutations error_sign ...      # some
    python -m tests.mutations --whole             # each against the whole suite (hours)

It changes a copy of the checkout, never the checkout itself, and the copy's tests import the copy's
package. The tests must first pass there, or their failure would say nothing. The exit code is 1 if
a mistake survives, or no longer fits the source.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_dynmoe.settings.messages.command_line import CommandParser
from tests.mutations.mutation import Mutation
from tests.mutations.planted import MUTATIONS

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_dynmoe"
NEVER_COPIED = shutil.ignore_patterns(
    ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info"
)
PASSED, FAILED = 0, 1  # pytest's exit codes; others say that no test has run


def main() -> None:
    parser = CommandParser(prog="python -m tests.mutations", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations; default: all")
    parser.add_argument("--whole", action="store_true", help="the whole suite against each")
    options = parser.parse_args()
    unknown = set(options.names) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"there is no mutation {', '.join(sorted(unknown))}; see planted/")
    chosen = [m for m in MUTATIONS if not options.names or m.name in options.names]

    misfits = [m for m in chosen if not m.fits((REPOSITORY / PACKAGE / m.file).read_text())]
    for mutation in misfits:
        print(f"{mutation.name}: its text is not exactly once in {mutation.file}: mend planted/")
    chosen = [m for m in chosen if m not in misfits]

    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(REPOSITORY, copy, ignore=left_out, symlinks=True)
        if (REPOSITORY / ".venv").exists():
            (copy / ".venv").symlink_to(REPOSITORY / ".venv")
        check_what_is_imported(copy)
        if not options.whole:
            check_that_all_pass(copy, chosen)
        survivors = [
            mutation for mutation in chosen if not is_caught(copy, mutation, options.whole)
        ]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mistakes are caught")
    sys.exit(1 if survivors or misfits else 0)


def left_out(folder: str, names: list[str]) -> set[str]:
    """What is not copied of a folder: caches and, of the repository itself, its runs.

    Without a room of the package, Python would take the room of the installed package instead.
    """
    runs = {"runs"} if Path(folder) == REPOSITORY else set()
    return NEVER_COPIED(folder, names) | runs


def check_what_is_imported(copy: Path) -> None:
    """The tests of the copy must import the package of the copy."""
    command = [sys.executable, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"]
    found = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    if Path(found.stdout.strip()) != copy / PACKAGE / "__init__.py":
        sys.exit(f"the copy's tests would import {found.stdout or found.stderr}")


def check_that_all_pass(copy: Path, mutations: Iterable[Mutation]) -> None:
    """Without a mistake; together, because starting takes longer than most tests."""
    start = time.monotonic()
    tests = {test: None for mutation in mutations for test in mutation.tests}
    code, output = run_tests(copy, list(tests))
    if code != PASSED:
        sys.exit(f"{output}\nwithout a mistake the tests must pass; pytest ended with {code}")
    print(f"without a mistake all pass ({time.monotonic() - start:.0f} s)", flush=True)


def is_caught(copy: Path, mutation: Mutation, whole: bool) -> bool:
    """Plant a mistake, run its tests, and take it out again."""
    path = copy / PACKAGE / mutation.file
    source = path.read_text()
    mutated = mutation.plant(source)
    compile(mutated, path, "exec")
    path.write_text(mutated)
    start = time.monotonic()
    try:
        if whole:
            code, output = run_tests(copy, ["tests"])
        else:
            code, output = run_tests(copy, mutation.tests)
    finally:
        path.write_text(source)
    if code not in (PASSED, FAILED):
        sys.exit(f"{output}\n{mutation.name}: no test has run; pytest ended with {code}")
    verdict = "caught" if code == FAILED else "SURVIVED"
    seconds = time.monotonic() - start
    print(f"{verdict:<9} {mutation.name:<34} {mutation.file} ({seconds:.0f} s)", flush=True)
    return code == FAILED


def run_tests(copy: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Exit code and the end of the output of pytest on the copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    return done.returncode, done.stdout[-3000:] + done.stderr[-1000:]


def environment(copy: Path) -> dict[str, str]:
    # Compiled files are told from their source by its time in seconds and its size.
    return os.environ | {
        "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"
    }  # fmt: skip


if __name__ == "__main__":
    main()
