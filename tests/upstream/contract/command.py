"""The command line of ``make try-megatron``."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check
from megatron_dynmoe.doctor.table import write_table
from megatron_dynmoe.settings.messages.command_line import CommandParser, ending_plainly
from tests.upstream.contract.place import Place, place
from tests.upstream.contract.probe import PROBES, probe
from tests.upstream.contract.suites import LONG, SUITES, run

REPOSITORY = Path(__file__).resolve().parents[3]
PARTS = (*PROBES, *SUITES)


def main(argv: Sequence[str] | None = None) -> int:
    """Try and report; 0 if all holds, 1 if something breaks, 2 for a misuse."""
    parser = CommandParser(
        prog="tools/try_megatron.py",
        description="Tries this package on another Megatron: the names that it imports, the table "
        "of settings, every patch, and tests of layers, dispatch and trainings. Works in a copy.",
        epilog="Exit code: 0 all holds, warnings included; 1 something breaks; 2 misuse.",
        example="tools/try_megatron.py ../Megatron-LM --parts patches settings",
    )
    parser.add_argument(
        "megatron", metavar="PATH_OR_VERSION", help="a checkout of Megatron-LM, or a release"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=[part for part in PARTS if part not in LONG],
        help=f"default: all but {', '.join(LONG)}, which takes minutes",
    )
    parser.add_argument("--all", action="store_true", help="all parts")
    parser.add_argument("--json", action="store_true", help="write JSON instead of tables")
    args = parser.parse_args(argv)
    with (
        ending_plainly(parser.prog, "not everything was tried"),
        tempfile.TemporaryDirectory(prefix="megatron-") as folder,
    ):
        there = place(args.megatron, Path(folder))
        if not args.json:
            print(f"megatron-core {there.version}, {there.origin}", flush=True)
        checks = {}
        for part, found in _try(there, [p for p in PARTS if args.all or p in args.parts]):
            checks[part] = found
            if not args.json:
                print(f"\n{part}", flush=True)
                write_table(found, sys.stdout)
    every = [check for found in checks.values() for check in found]
    counts = {
        state: sum(check.state == state for check in every) for state in (PASSED, WARNING, FAILED)
    }
    if args.json:
        parts = {part: [check._asdict() for check in found] for part, found in checks.items()}
        about = {"megatron": there.version, "origin": there.origin, "commit": there.commit}
        print(json.dumps(about | {"parts": parts} | counts, indent=2))
    else:
        verdict = f"{counts[FAILED]} checks failed" if counts[FAILED] else "all holds"
        print(f"\nmegatron-core {there.version}: {verdict}")
    return int(counts[FAILED] > 0)


def _try(there: Place, parts: Sequence[str]) -> Iterator[tuple[str, list[Check]]]:
    """The findings of each part, in turn."""
    path = os.pathsep.join([str(there.folder), str(REPOSITORY)])
    variables = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DYNMOE_DEVICE": "cpu"}
    probes = [part for part in parts if part in PROBES]
    if probes:
        yield from probe(probes, variables, there).items()
    for part in parts:
        if part in SUITES:
            yield part, run(part, variables, there.folder)
