"""A part of the study: trainings of its own, whose results are rows in the repository.

Machines are short-lived, so a part is trained run by run, on any day: each finished run adds its
row to study/results/NAME.json, and the table is printed from all rows that are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dynmoe.settings.messages.command_line import CommandParser
from megatron_dynmoe.storage.atomic import replace_file
from study import corpus, fingerprint, runs
from study.queue import Queue, alone
from study.results import RESULTS
from study.variants import SIZES, Variant

Rows = dict[str, Any]  # by the name of a run


@dataclass(frozen=True)
class Part:
    """What is trained, and what becomes of it.

    Attributes:
        name: of the module, and of the file of results.
        about: the help text.
        variants: what is trained, by name.
        measure: what a row holds of a finished run, beside its commit.
        table: the lines of the table, in Markdown.
    """

    name: str
    about: str | None
    variants: Mapping[str, Variant]
    measure: Callable[[runs.Run, corpus.Corpus], dict[str, Any]]
    table: Callable[[Rows], list[str]]

    @property
    def results(self) -> Path:
        """The file of the rows."""
        return RESULTS / f"{self.name}.json"

    @property
    def num_runs(self) -> int:
        """The runs of all seeds."""
        return sum(variant.num_seeds for variant in self.variants.values())


def main(part: Part, argv: Sequence[str] | None = None) -> int:
    """Train what is not finished, measure it, and print the table; returns the exit code."""
    args = _parser(part).parse_args(argv)
    size = SIZES["quick" if args.quick else "cpu"]
    folder = args.runs or runs.default_folder(args.quick)
    files = corpus.files_of(None)
    text = corpus.corpus_of(files, size.vocab_size, folder)
    planned = runs.plan(
        size,
        text,
        fingerprint.of_code(),
        folder,
        only=args.only,
        num_seeds=1 if args.quick else args.seeds,
        variants=part.variants,
    )
    results = folder / part.results.name if args.quick else part.results
    rows = read_rows(results)
    if args.list:
        for run in planned:
            done = "in the results" if run.name in rows else f"{run.iteration} of {run.size.steps}"
            print(f"{run.name:<24} {done:<16} {run.variant.title}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        corpus.prepare(text, files, size.vocab_size, size.sequence_length)
        left = [run for run in planned if run.name not in rows]

        def measure(run: runs.Run) -> None:
            print(f"{run.name}: held-out text", flush=True)
            rows[run.name] = {"commit": run.commit, **part.measure(run, text)}
            kept = json.dumps(rows, indent=2, sort_keys=True) + "\n"
            replace_file(results, lambda partial: partial.write_text(kept))

        for run in left:  # from before, when something stopped the study
            if run.is_finished:
                measure(run)
        queue = Queue(left, text, args.jobs)
        queue.train(then=measure)
    print("\n".join(part.table(rows)))
    for failure in queue.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if queue.stopped_by is not None:
        return 128 + queue.stopped_by
    return 1 if queue.failures else 0


def read_rows(results: Path) -> Rows:
    """The rows of finished runs; none before the first."""
    return json.loads(results.read_text()) if results.is_file() else {}


def of_variant(rows: Rows, name: str) -> list[dict[str, Any]]:
    """The rows of all seeds of a variant."""
    return [row for run, row in sorted(rows.items()) if run.rpartition("-seed")[0] == name]


def end(part: Part) -> None:
    """Run as a command, and exit."""
    try:
        sys.exit(main(part))
    except (ValueError, OSError) as error:
        sys.exit(f"study: error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"study: error: {Path(error.cmd[1]).name} failed")


def _parser(part: Part) -> argparse.ArgumentParser:
    parser = CommandParser(prog=f"python -m study.{part.name}", description=part.about)
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="NAME", help=f"runs: {', '.join(part.variants)}")
    add("--seeds", type=int, metavar="N", help="at most so many seeds of each (default: all)")
    add("--list", action="store_true", help="show the runs and how far they are")
    add("--quick", action="store_true", help="a tiny model, to see whether everything works")
    add("--jobs", type=int, default=2, metavar="N", help="trainings side by side")
    add("--runs", type=Path, metavar="DIR", help="folder of the runs (default: runs/study)")
    return parser
