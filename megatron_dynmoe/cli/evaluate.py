"""Evaluate a model with EleutherAI's lm-eval and count its experts per token by task.

The model is an exported folder (--model; any causal language model in safetensors will do) or, as
it is, a checkpoint that a training saved (--load), of any layout. No code from either is run.

Presets are the tasks of two papers: dynamic_moe (piqa, hellaswag, arc-e, commonsenseqa, winogrande
without examples, bbh with 3) and dtop_p (svamp with 5 examples; mmlu, arc-e, arc-c, copa, piqa,
hellaswag, winogrande, lambada_openai, boolq, lsat-ar, lsat-lr, lsat-rc without). Each of these
names is a preset, too. For any other lm-eval task, give its name; for a task of your own, its YAML
file.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from megatron_dynmoe.settings.messages.command_line import (
    CommandParser,
    UsageError,
    add_budget_flag,
    add_runtime_flags,
    ending_plainly,
    number,
)
from megatron_dynmoe.settings.messages.outputs import check_parent
from megatron_dynmoe.storage.atomic import replace_file
from megatron_dynmoe.storage.json_files import measured_json


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    parser = _parser()
    args = parser.parse_args(argv)
    with ending_plainly(parser.prog):
        report = _run(args, _check(args, parser))
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


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Path:
    """Refuse what can be refused before tasks and weights are read; return the folder to read."""
    from megatron_dynmoe.conversion.hugging_face.folder import check_is_model
    from megatron_dynmoe.conversion.megatron.checkpoint import checkpoint_folder

    for flag in ("iteration", "tokenizer"):
        if args.load is None and getattr(args, flag) is not None:
            parser.error(f"--{flag} is of a checkpoint: give it with --load")
    if args.output is not None:
        check_parent(args.output)
    if args.load is None:
        check_is_model(args.model)
        return args.model
    if (args.load / "config.json").is_file():
        raise UsageError(f"--load is {args.load}, an exported model: name it with --model")
    return checkpoint_folder(args.load, args.iteration)


def _run(args: argparse.Namespace, source: Path) -> dict[str, Any]:
    from megatron_dynmoe.use import budgets, load
    from megatron_dynmoe.use.evaluate import evaluate, load_tasks
    from megatron_dynmoe.use.vocabulary import check_given

    load.be_quiet()
    if args.budget is not None and args.load is None:  # before the tasks' data are downloaded
        budgets.set_budget(load.load_config(source), args.budget)
    tasks = load_tasks(args.tasks.split(","), args.include_path)  # before minutes of loading
    # A checkpoint becomes a folder until the evaluation is over.
    is_checkpoint = args.load is not None
    exported = load.in_our_format(source, args.tokenizer) if is_checkpoint else nullcontext(source)
    with exported as folder:
        config = load.load_config(folder)
        budgets.set_budget(config, args.budget)
        tokenizer = load.load_tokenizer(folder)
        load.check_ids(len(tokenizer) - 1, config)
        if args.tokenizer is not None:
            check_given(args.tokenizer, tokenizer, source)
        device = args.device or load.default_device()
        model = load.load_model(folder, config, dtype=args.dtype, device=device)
        budgets.keep_to_config(model)
        report = evaluate(
            model,
            tokenizer,
            tasks,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            batch_size=args.batch_size,
        )
    dtype = str(model.dtype).removeprefix("torch.")
    budget = getattr(model.config, "inference_experts_per_token", None)
    about = {"model": str(source), "dtype": dtype, "device": device, "experts_asked_for": budget}
    return about | report


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
    if report["experts_asked_for"] is not None:
        print(f"asked for: {report['experts_asked_for']:g} experts per token\n")
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
    text = measured_json(report)
    replace_file(path, lambda partial: partial.write_text(text, "utf-8"))
    print(f"\nwritten: {path}")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        description=__doc__,
        example="dynmoe evaluate --load runs/quickstart/checkpoints --tasks piqa --limit 100",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="DIR", help="exported folder")
    source.add_argument(
        "--load", type=Path, metavar="CKPT", help="what --save named in training, as it is"
    )
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="which checkpoint (default: the latest)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="the tokenizer of the training, if the checkpoint's is not here",
    )
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
    add_budget_flag(parser)
    add_runtime_flags(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all results as JSON")
    return parser
