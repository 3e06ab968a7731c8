"""Evaluate an exported model with EleutherAI's lm-eval and count its experts per token by task.

Presets are the tasks of Dynamic MoE, with its numbers of examples (BBH 3, the others 0): paper for
all of them, or piqa, hellaswag, arc-e, commonsenseqa, bbh, winogrande. For any other lm-eval task,
give its name; for a task of your own, its YAML file. It works with any causal language model in
safetensors, and runs no code from the model's folder.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dynmoe.settings.command_line import (
    CommandParser,
    UsageError,
    add_runtime_flags,
    ending_plainly,
    number,
)
from megatron_dynmoe.storage.atomic import replace_file


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    parser = _parser()
    args = parser.parse_args(argv)
    with ending_plainly(parser.prog):
        report = _run(args)
        if report["tasks"]:
            _print_tasks(report)
            _print_layers(report)
        if args.output is not None:
            _write(report, args.output)
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
    for name, reason in report["failed"].items():
        print(f"{parser.prog}: error: task {name} has no results: {reason}", file=sys.stderr)
    if report["interrupted"]:
        print(f"{parser.prog}: interrupted: later tasks were not evaluated", file=sys.stderr)
        sys.exit(130)
    if report["failed"]:
        sys.exit(1)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_dynmoe.use import load
    from megatron_dynmoe.use.evaluate import evaluate, load_tasks

    if args.output is not None and not args.output.absolute().parent.is_dir():
        raise UsageError(f"--output is {args.output}: there is no folder for it; create it")
    load.be_quiet()
    config = load.load_config(args.model)
    tokenizer = load.load_tokenizer(args.model)
    load.check_ids(len(tokenizer) - 1, config)
    tasks = load_tasks(args.tasks.split(","), args.include_path)  # before minutes of loading
    device = args.device or load.default_device()
    model = load.load_model(args.model, config, dtype=args.dtype, device=device)
    report = evaluate(
        model,
        tokenizer,
        tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
    )
    dtype = str(model.dtype).removeprefix("torch.")
    return {"model": str(args.model), "dtype": dtype, "device": device, **report}


def _print_tasks(report: dict[str, Any]) -> None:
    rows = []
    for name, entry in {**report["groups"], **report["tasks"]}.items():
        experts = entry["mean_experts_per_token"]
        if experts is None:
            experts = "-"
        else:
            experts = f"{experts:.3f}" if entry["experts_are_counted"] else f"{experts} (fixed)"
        shots = str(entry["num_fewshot"])
        for metric, measured in entry["metrics"].items():
            error = "-" if measured["stderr"] is None else f"{measured['stderr']:.4f}"
            rows.append([name, shots, metric, f"{measured['value']:.4f}", error, experts])
            name = shots = experts = ""
    print()
    _print_table(["task", "shots", "metric", "value", "stderr", "experts/token"], rows)


def _print_layers(report: dict[str, Any]) -> None:
    """Print experts per token: a row per layer, and a column for each task that was asked for."""
    entries = {**report["tasks"], **report["groups"]}
    columns = {
        name: entries[name].get("experts_per_token_by_layer")
        for name in report["requested"]
        if name in entries
    }
    if not columns or not all(columns.values()):
        return
    layers = [*next(iter(columns.values()))]
    rows = [[layer, *(f"{column[layer]:.3f}" for column in columns.values())] for layer in layers]
    print()
    _print_table(["layer", *columns], rows)


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    # Text is aligned left, numbers right.
    left = [not any(row[i][:1].isdigit() for row in rows) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = zip(row, widths, left, strict=True)
        print("  ".join(f"{c:<{w}}" if to_left else f"{c:>{w}}" for c, w, to_left in cells))


def _write(report: dict[str, Any], path: Path) -> None:
    text = json.dumps(report, indent=2) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, "utf-8"))
    print(f"\nwritten: {path}")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        description=__doc__, example="dynmoe evaluate --model my-model --tasks piqa --limit 100"
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported folder")
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="TASK,...",
        help="presets, names of lm-eval's tasks, or YAML files",
    )
    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="a folder of your own tasks, by name"
    )
    parser.add_argument(
        "--num-fewshot", type=number(int, 0), metavar="N", help="default: as each task says"
    )
    parser.add_argument(
        "--limit", type=number(int, 1), metavar="N", help="only the first N documents of each task"
    )
    parser.add_argument("--batch-size", type=number(int, 1), default=8, help="default: %(default)s")
    add_runtime_flags(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all results as JSON")
    return parser
