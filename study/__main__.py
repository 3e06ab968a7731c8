"""Trains the study's runs and writes its results; see docs/study.md.

python -m study [--list] [--only NAME ...] [--quick]
python -m study part NAME ...    # as python -m study.NAME
python -m study document
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dynmoe.settings.messages.command_line import CommandParser, number
from study import corpus, document, fingerprint, results, runs, sections
from study.queue import Queue, alone
from study.variants import SIZES, VARIANTS, Size


def main(argv: Sequence[str] | None = None) -> int:
    """Do as the command line says; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["part"]:
        return _part(*argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.command == "document":
            return _document()
        return _study(args)
    except (ValueError, OSError) as error:
        print(f"study: error: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"study: error: {Path(error.cmd[1]).name} failed", file=sys.stderr)
    return 1


def _part(name: str = "", *argv: str) -> int:
    if name not in sections.NAMES:
        print(f"study: error: PART={name}: use one of {', '.join(sections.NAMES)}", file=sys.stderr)
        return 2
    os.execv(sys.executable, [sys.executable, "-m", f"study.{name}", *argv])


def _study(args: argparse.Namespace) -> int:
    size = SIZES["quick" if args.quick else args.size]
    if args.tokens_scale is not None:
        size = size.scaled(args.tokens_scale)
    recorded = size.recorded and args.text is None
    folder = args.runs or runs.default_folder(args.quick)
    files = corpus.files_of(args.text)
    if size.name == "gpu" and args.text is None and not args.list:
        raise ValueError(
            f"the size gpu trains on {size.steps * size.tokens_per_step / 1e6:.0f} M tokens, and "
            "examples/data has 1.6 M: give text of your own with --text."
        )
    text = corpus.corpus_of(files, size.vocab_size, folder)
    planned = runs.plan(
        size,
        text,
        fingerprint.of_code(),
        folder,
        only=args.only,
        num_seeds=1 if args.quick else None,
        any_code=args.any_code,
    )
    if args.list:
        _list(planned, size)
        return 0

    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        # 1. Text
        print(f"text: {text.folder}", flush=True)
        corpus.prepare(text, files, size.vocab_size, size.sequence_length)

        # 2. Trainings
        queue = Queue(planned, text, args.jobs or size.jobs)
        queue.train()
        if queue.stopped_by is not None:
            print("stopped. The same command goes on.", flush=True)
            return 128 + queue.stopped_by

        # 3. What trained models show, and all of it on paper
        finished = [run for run in planned if run.is_finished]
        content = _content(finished, text)
        where = results.RESULTS if recorded and not args.only else folder / "results"
        results.write(where, size.name, content)
        print(f"written: {where / size.name}.json and .csv")
        if where == results.RESULTS and size.name == document.SIZE:
            for path in document.write(results.Results(content)):
                print(f"written: {path}")
    for failure in queue.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if queue.failures else 0


def _content(finished: Sequence[runs.Run], text: corpus.Corpus) -> dict[str, Any]:
    from study import afterwards  # imports PyTorch, which --list does not need

    rows, post_hoc, analyses = [], [], []
    for run in finished:
        print(f"{run.name}: held-out text", flush=True)
        rows.append(results.row_of(run, afterwards.held_out(run, text)))
    for run in finished:
        if run.variant.name == "top2":
            print(f"{run.name}: thresholds after the fact", flush=True)
            post_hoc += afterwards.post_hoc(run, text)
    for run in finished:
        if run.variant.name in afterwards.ANALYZED and run.seed == 1:
            print(f"{run.name}: experts by source, layer and token", flush=True)
            analyses.append(afterwards.analysis(run, text))
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {_processor()}",
        "data": text.fingerprint,
        "runs": rows,
        "post_hoc": post_hoc,
        "analysis": analyses,
    }


def _document() -> int:
    found = results.Results.read(results.RESULTS / f"{document.SIZE}.json")
    for path in document.write(found):
        print(f"written: {path}")
    return 0


def _list(planned: Sequence[runs.Run], size: Size) -> None:
    width = max(len(run.name) for run in planned)
    for run in planned:
        state = "finished" if run.is_finished else f"{run.iteration} of {size.steps} steps"
        print(f"{run.name:<{width}}  {state:<18}  {run.variant.title}")
    tokens = size.steps * size.tokens_per_step
    print(f"{len(planned)} runs of {tokens:,} tokens")


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m study",
        description="Train the study's runs that are not finished, and write its results.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("run", "document"),
        default="run",
        help="run (the default), or document: write docs/study.md again from the results",
    )
    parser.add_argument("--list", action="store_true", help="show the runs and how far they are")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"these variants: {', '.join(VARIANTS)}",
    )
    parser.add_argument(
        "--size", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model and a few steps, to see whether everything works",
    )
    parser.add_argument(
        "--tokens-scale",
        type=number(float, 0.01, 100),
        metavar="FACTOR",
        help="multiply the tokens of every run by this; results are not recorded",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="files or folders instead of examples/data, of JSON lines with a field text, or any "
        "other that tools/preprocess_data.py reads; results are not recorded",
    )
    parser.add_argument("--jobs", type=number(int, 1), metavar="N", help="trainings side by side")
    parser.add_argument(
        "--any-code",
        action="store_true",
        help="take finished runs even if the code that trains has changed since",
    )
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="folder of the runs (default: runs/study)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
