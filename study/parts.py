"""A part of the study: trainings of its own, whose results are rows in the repository.

Machines are short-lived, so a part is trained run by run, on any day: each finished run adds its
row to study/results/NAME.json, and the table is printed from all rows that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dynmoe.settings.messages.command_line import CommandParser, number
from megatron_dynmoe.storage.atomic import replace_file
from study import corpus, fingerprint, flops, runs
from study.queue import Queue, alone
from study.results import RESULTS, Noise, Results, compared_by_seed, noise_beside_seeds
from study.variants import SIZES, Variant

Rows = dict[str, Any]  # by the name of a run
Losses = dict[str, dict[int, float]]  # by the name of a variant, and by seed
LOSS, EXPERTS = "validation_loss", "validation_experts_per_token"


@dataclass(frozen=True)
class Part:
    """What is trained, and what becomes of it.

    Attributes:
        name: of the module, and of the file of results.
        about: what it asks, how it is called, and more of it, in paragraphs.
        variants: what is trained, by name.
        measure: what a row holds of a finished run, beside its commit.
        table: the lines of the table, in Markdown, from all rows; the results of the main study
            tell more of what seeds alone cause.
        beside: another part, whose rows the table shows, too.
    """

    name: str
    about: str | None
    variants: Mapping[str, Variant]
    measure: Callable[[runs.Run, corpus.Corpus], dict[str, Any]]
    table: Callable[[Rows, Results | None], list[str]]
    beside: str | None = None

    @property
    def results(self) -> Path:
        """The file of the rows."""
        return RESULTS / f"{self.name}.json"

    @property
    def num_runs(self) -> int:
        """The runs of all seeds."""
        return len(self.run_names)

    @property
    def run_names(self) -> list[str]:
        """The names of the runs of all seeds, which are those of their rows."""
        return run_names(self.variants)

    def all_rows(self, folder: Path = RESULTS) -> Rows:
        """What the table shows."""
        own = read_rows(folder / self.results.name)
        return joined(own, read_rows(folder / f"{self.beside}.json")) if self.beside else own


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
    if args.fill:
        if filled := flops.fill(rows, planned, folder):
            _keep(rows, results)
        print(f"{results}: {', '.join(filled) or 'no row'} filled")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        corpus.prepare(text, files, size.vocab_size, size.sequence_length)
        left = [run for run in planned if run.name not in rows]

        def measure(run: runs.Run) -> None:
            print(f"{run.name}: held-out text", flush=True)
            rows[run.name] = {"commit": run.commit, **part.measure(run, text)}
            _keep(rows, results)

        for run in left:  # from before, when something stopped the study
            if run.is_finished:
                measure(run)
        queue = Queue(left, text, args.jobs)
        queue.train(then=measure)
    of_main = None if args.quick else Results.read(RESULTS / f"{size.name}.json")
    print("\n".join(part.table(part.all_rows(results.parent), of_main)))
    for failure in queue.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if queue.stopped_by is not None:
        return 128 + queue.stopped_by
    return 1 if queue.failures else 0


def read_rows(results: Path) -> Rows:
    """The rows of finished runs; none before the first."""
    return json.loads(results.read_text()) if results.is_file() else {}


def joined(rows: Rows, others: Rows) -> Rows:
    """Rows, and others of variants that they lack: all seeds of a variant are from one file."""
    known = {variant_of(run) for run in rows}
    return rows | {run: row for run, row in others.items() if variant_of(run) not in known}


def variant_of(run: str) -> str:
    """The variant of a run of this name."""
    return run.rpartition("-seed")[0]


def prose(about: str | None) -> list[str]:
    """The paragraphs of a module's docstring, without that of commands."""
    paragraphs = (about or "").strip().split("\n\n")
    return [text for text in paragraphs if not text.startswith("    ")]


def of_variant(rows: Rows, name: str) -> list[dict[str, Any]]:
    """The rows of all seeds of a variant."""
    return [row for run, row in sorted(rows.items()) if variant_of(run) == name]


def noise(found: Losses, of_main: Results | None) -> Noise | None:
    """That of the held-out loss, by a part's losses and the main study's of other variants."""
    others = set() if of_main is None else of_main.rows.keys() - found.keys()
    of_others = {name: of_main.by_seed(name, LOSS) for name in others} if of_main else {}
    known = [each for each in map(noise_beside_seeds, (found, of_others)) if each is not None]
    degrees = sum(each.freedom for each in known)
    squares = sum(each.deviation**2 * each.freedom for each in known)
    apart = frozenset[str]().union(*(each.apart for each in known))
    return Noise(math.sqrt(squares / degrees), degrees, apart) if degrees else None


def losses(rows: Rows) -> Losses:
    """Held-out losses by variant and seed."""
    found: Losses = {}
    for run, row in sorted(rows.items()):
        name, _, seed = run.rpartition("-seed")
        found.setdefault(name, {})[int(seed)] = row[LOSS]
    return found


def mean(rows: Sequence[dict[str, Any]], name: str, form: str, unit: float = 1) -> str:
    """A cell: the mean of a measure, in a unit, over the rows that have it."""
    values = [row[name] / unit for row in rows if row.get(name) is not None]
    return format(statistics.fmean(values), form) if values else "-"


def run_names(variants: Mapping[str, Variant]) -> list[str]:
    """The names of the runs of all seeds."""
    return [
        f"{name}-seed{seed + 1}"
        for name, variant in variants.items()
        for seed in range(variant.num_seeds)
    ]


def cells(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Three cells of a variant's rows: seeds, held-out loss and experts per token."""
    return [str(len(rows)), mean(rows, LOSS, ".4f"), mean(rows, EXPERTS, ".2f")]


def more_than(reference: str, name: str, found: Losses, noise: Noise | None) -> tuple[str, str]:
    """Two cells: by how much a variant's loss is more than another's, and whether it is worse."""
    if name == reference:
        return "", ""
    if reference not in found or name not in found:
        return "-", ""
    more = compared_by_seed(found, name, reference, noise)
    if math.isnan(more.difference):
        return "-", ""
    return more.interval, more.verdict("better", "worse")


def held_out(run: runs.Run, text: corpus.Corpus) -> dict[str, Any]:
    """Loss and experts on all held-out text, and the training's work: a row of most parts."""
    from study import afterwards  # imports PyTorch

    return afterwards.held_out(run, text) | {flops.FLOPS: flops.measured(run)}


def end(part: Part) -> None:
    """Run as a command, and exit."""
    try:
        sys.exit(main(part))
    except (ValueError, OSError) as error:
        sys.exit(f"study: error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"study: error: {Path(error.cmd[1]).name} failed")


def _keep(rows: Rows, results: Path) -> None:
    kept = json.dumps(rows, indent=2, sort_keys=True) + "\n"
    replace_file(results, lambda partial: partial.write_text(kept))


def _parser(part: Part) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"python -m study.{part.name}", description=" ".join(prose(part.about))
    )
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="NAME", help=f"runs: {', '.join(part.variants)}")
    add(
        "--seeds",
        type=number(int, 1),
        metavar="N",
        help="at most so many seeds of each (default: all)",
    )
    add("--list", action="store_true", help="show the runs and how far they are")
    add(
        "--fill",
        action="store_true",
        help="train nothing: add the work in experts to rows that lack it, from the runs in --runs",
    )
    add("--quick", action="store_true", help="a tiny model, to see whether everything works")
    add("--jobs", type=number(int, 1), default=2, metavar="N", help="trainings side by side")
    add("--runs", type=Path, metavar="DIR", help="folder of the runs (default: runs/study)")
    return parser
