"""``dynmoe analyze``: shows how a model uses its experts on text."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dynmoe.cli.reading import add_key_flag, add_reading_flags
from megatron_dynmoe.data.text.records import Limits, Unreadable
from megatron_dynmoe.settings.messages.command_line import (
    CommandParser,
    UsageError,
    add_runtime_flags,
    ending_plainly,
    number,
    thresholds,
)
from megatron_dynmoe.settings.messages.outputs import check_new_folder

SAMPLE_TOKENS = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Analyze as the command line says; return the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    with ending_plainly(parser.prog):
        _check(args, parser)
        content = _report(args)
        _print(content, args.output)
    return 0


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what can be refused without a model."""
    if args.merge is not None and (args.model or args.data or args.group):
        parser.error("--merge takes no --model, --data or --group: everything is in the files")
    if args.merge is None and not (args.model and (args.data or args.group)):
        parser.error("give --model and text, by --data or --group; or --merge")
    if args.source_key is not None and args.group:
        parser.error("--source-key and --group both name groups: give one of them")
    check_new_folder(args.output, args.overwrite)


def _report(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_dynmoe.analysis.results.write_results import merge, write_results

    measured = merge(args.merge) if args.merge else _measure(args)
    return write_results(args.output, measured, min_count=args.min_count, overwrite=args.overwrite)


class _Subject(NamedTuple):
    """What is looked at, and how it reads."""

    model: Any
    tokenizer: Any
    tokenizer_folder: Path
    shape: Any
    letters: Any
    length: int  # tokens of a window


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_dynmoe.analysis.counting import measure
    from megatron_dynmoe.analysis.counting.tokens import token_text
    from megatron_dynmoe.analysis.counting.windows import Reading, check_text, name_groups
    from megatron_dynmoe.analysis.results import write_results as results
    from megatron_dynmoe.use import load, vocabulary

    load.be_quiet()
    files = name_groups(args.data, args.group, args.source_key)
    _check_output(args.output, [args.model, args.tokenizer, *(file.path for file in files)])
    num_skipped = 0

    def on_unreadable(unreadable: Unreadable) -> None:
        nonlocal num_skipped
        if args.on_error == "stop":
            raise unreadable
        num_skipped += 1

    limits = Limits(args.max_line_bytes, args.max_expansion)
    reading = Reading(args.json_keys, args.source_key, on_unreadable, limits)
    check_text(files, reading)
    num_skipped = 0
    with load.in_our_format(args.model, args.tokenizer) as folder:
        subject = _open(args, folder, len({file.group for file in files}))
        kept = measure.SweepWindows(args.sweep_tokens)
        collected = _count(args, subject, files, reading, kept)
        swept = None if args.sweep == [] else _sweep(args.sweep, subject, kept.chosen())
        model, tokenizer = subject.model, subject.tokenizer
        dtype = str(model.dtype).removeprefix("torch.")
        described = vocabulary.describe(tokenizer, subject.tokenizer_folder)
        return results.measurement(
            results.describe_model(
                "/".join(args.model.resolve().parts[-2:]), model, dtype, described
            ),
            collected,
            tokenizer,
            measure.texts_of(tokenizer, collected, token_text),
            swept,
            args.separate_documents,
            num_skipped,
        )


def _open(args: argparse.Namespace, folder: Path, num_groups: int) -> _Subject:
    """Check everything that can be wrong before the weights are read; then read them."""
    from megatron_dynmoe.analysis.counting.collect import shape_of
    from megatron_dynmoe.analysis.counting.tokens import letters_of
    from megatron_dynmoe.conversion.convert import has_tokenizer
    from megatron_dynmoe.use import load, vocabulary

    config = load.load_config(folder)
    if "sparse" not in config.mlp_layer_types:
        raise ValueError(
            f"--model {args.model}: the model has no layer with experts, so there is no "
            "routing to look at"
        )
    positions = config.max_position_embeddings
    length = args.sequence_length or min(positions, 2048)
    if length > positions:
        raise UsageError(f"--sequence-length is {length}: the model has {positions} positions")
    brings_its_own = args.tokenizer is None or folder != args.model
    if brings_its_own and not has_tokenizer(folder):
        raise UsageError(
            f"--model {args.model} brings no tokenizer: name the training's with --tokenizer"
        )
    tokenizer_folder = folder if brings_its_own else args.tokenizer
    tokenizer = load.load_tokenizer(tokenizer_folder)
    load.check_ids(len(tokenizer) - 1, config)
    if args.tokenizer is not None:
        vocabulary.check_given(args.tokenizer, tokenizer, args.model)
    if args.tokens is not None and args.source_key is None:
        _check_enough(args, num_groups * args.tokens, length)
    letters, shape = letters_of(tokenizer, config.vocab_size), shape_of(config, length)
    device = args.device or load.default_device()
    model = load.load_model(folder, config, dtype=args.dtype, device=device)
    return _Subject(model, tokenizer, tokenizer_folder, shape, letters, length)


def _count(args: argparse.Namespace, subject: _Subject, files: Any, reading: Any, kept: Any) -> Any:
    """Read all text in one pass, in memory that does not grow with it; ``kept`` is filled."""
    from tqdm import tqdm

    from megatron_dynmoe.analysis.counting.collect import collect
    from megatron_dynmoe.analysis.counting.windows import read_windows

    started = time.monotonic()
    num_tokens = 0
    size = sum(file.path.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="text", disable=None) as bar:

        def on_tokens(tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += tokens
            bar.set_postfix_str(f"{num_tokens:,} tokens", refresh=False)

        windows = read_windows(
            files,
            subject.tokenizer,
            subject.length,
            reading,
            separate=args.separate_documents,
            limit=args.tokens,
            on_read=bar.update,
        )
        collected = collect(
            subject.model,
            kept.passing(windows),
            subject.shape,
            subject.letters,
            sample_tokens=SAMPLE_TOKENS,
            on_tokens=on_tokens,
        )
    seconds = time.monotonic() - started
    print(f"{num_tokens:,} tokens in {seconds:.0f} s: {num_tokens / seconds:,.0f} tokens/s\n")
    _check_enough(args, num_tokens, subject.length)
    return collected


def _sweep(thresholds: list[float] | None, subject: _Subject, windows: Any) -> Any:
    """Read the same windows again for every threshold."""
    from tqdm import tqdm

    from megatron_dynmoe.analysis.counting import measure

    total = None  # the default depends on what is found
    if thresholds is not None:
        total = (1 + len(thresholds)) * sum(len(window.tokens) for window in windows)
    with tqdm(total=total, unit=" tokens", desc="sweep", disable=None) as bar:
        return measure.sweep(
            subject.model,
            windows,
            subject.shape,
            subject.letters,
            thresholds,
            on_tokens=bar.update,
        )


def _check_output(output: Path, read: Sequence[Path | None]) -> None:
    """Refuse a folder if --overwrite would replace an input together with it."""
    for path in read:
        if path is not None and path.resolve().is_relative_to(output.resolve()):
            raise UsageError(
                f"--output {output} is or holds {path}, which is read: name a folder elsewhere"
            )


def _check_enough(args: argparse.Namespace, num_tokens: int, length: int) -> None:
    """Refuse text, or a limit, of less than one window."""
    if num_tokens >= length or args.separate_documents:
        return
    limited = args.tokens is not None and args.tokens < length
    what, more = ("--tokens lets", "a larger one") if limited else ("the text has", "more text")
    kind = UsageError if limited else ValueError  # too little text is no misuse
    raise kind(
        f"{what} {num_tokens} tokens{' be read' if limited else ''}, less than one window of "
        f"{length}: give {more}, or --sequence-length {max(num_tokens, 2)}"
    )


def _print(content: dict[str, Any], output: Path) -> None:
    from megatron_dynmoe.analysis.results.write_results import shorten

    statistics = content["statistics"]
    # A name comes from a field that may hold anything, of any length.
    names = {name: shorten(name) for name in statistics["groups"]}
    width = max(len("group"), *map(len, names.values()))
    print(f"{'group':<{width}}{'tokens':>12}{'experts/token':>15}{'std':>7}{'loss, nats':>12}")
    for name, row in [*statistics["groups"].items(), ("all", statistics["all"])]:
        experts = row["experts_per_token"]
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        print(
            f"{names.get(name, name):<{width}}{row['tokens']:>12,}{experts['mean']:>15.3f}"
            f"{experts['std']:>7.2f}{loss:>12}"
        )
    means = (f"{row['experts_per_token']['mean']:.2f}" for row in statistics["layers"])
    print(f"\nby layer: {' '.join(means)}")
    found = statistics["all"]["rank_correlation"]["own_loss"]
    if found["value"] is not None:
        interval = (
            "" if found["low"] is None else f" (95 %: {found['low']:.3f} to {found['high']:.3f})"
        )
        print(f"rank correlation of experts with the token's loss: {found['value']:.3f}{interval}")
    for note in content["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"written: {output / 'index.html'}")


def _named_file(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text}: give NAME=FILE")
    return name, path


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        description="See where a model's experts go: how many each token uses, in which layer, on "
        "which text, and which experts. Writes a folder with routing.json (every count), figures, "
        "and index.html to look at. docs/analysis.md shows one and says what each figure means.",
        example="dynmoe analyze --model runs/quickstart/checkpoints --data examples/data/*.gz "
        "--output my-report",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="exported folder, or the checkpoints of a Megatron run (what --save named)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="the tokenizer of the training, if the model's folder has none",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")

    group = parser.add_argument_group("text: .txt, JSON lines (plain, .gz, .zst) or .parquet")
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files, folders or quoted globs; each file is a group of its own, called by its name",
    )
    group.add_argument(
        "--group",
        type=_named_file,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a file, folder or quoted glob with a name, such as a task's questions; repeatable",
    )
    add_key_flag(group)
    group.add_argument(
        "--source-key",
        metavar="KEY",
        help="the field that names each document's group, such as source, instead of the file",
    )
    group.add_argument(
        "--separate-documents",
        action="store_true",
        help="no window holds two documents, as questions need it; else packed as in training",
    )
    add_reading_flags(group)
    group.add_argument(
        "--tokens", type=number(int, 2), metavar="N", help="most tokens per group (default: all)"
    )
    group.add_argument(
        "--sequence-length",
        type=number(int, 2),  # one token to read, one to predict
        metavar="S",
        help="tokens per window (default: the model's positions, at most 2048)",
    )

    group = parser.add_argument_group("what to look at")
    group.add_argument(
        "--sweep",
        type=thresholds,
        metavar="T,...",
        help="thresholds to try instead of the trained one, such as 0.1,0.2, or none (default: "
        "0.05 to 0.5, and further if the model's own routing lies outside)",
    )
    group.add_argument(
        "--sweep-tokens",
        type=number(int, 2),
        default=16384,
        metavar="N",
        help="tokens that are read for each threshold (default: %(default)s)",
    )
    group.add_argument(
        "--min-count",
        type=number(int, 1),
        default=50,
        metavar="N",
        help="how often a token must appear to be listed (default: %(default)s)",
    )

    group = parser.add_argument_group("runtime")
    add_runtime_flags(group)
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="without a model: draw again one routing.json, or several of one model together",
    )
    return parser
