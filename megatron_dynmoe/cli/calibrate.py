"""Find the threshold that gives an exported model a target mean of experts per token on real text.

It works on models trained with a threshold and on models trained with top-k, folders of other
formats (Mixtral) among them. It prints threshold, mean experts, loss and perplexity over a sweep.
With --budgets it measures a curve, by which every later call can ask for another number of experts
(dynmoe generate --budget). It writes the result into config.json with --in-place or --output;
without one of them, it writes nothing.
"""

import argparse
import copy
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dynmoe.cli.reading import add_key_flag
from megatron_dynmoe.conversion.formats import OURS, format_in
from megatron_dynmoe.settings.messages.command_line import (
    CommandParser,
    UsageError,
    add_runtime_flags,
    budgets,
    ending_plainly,
    number,
    thresholds,
)
from megatron_dynmoe.settings.messages.outputs import check_new_folder, check_parent

DEFAULT_SWEEP = "0.1,0.2,0.3,0.4,0.5"  # the values of Dynamic MoE's Table 7 and Figure 4


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate as the command line says."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.target is None and not args.budgets:
        parser.error("give --target or --budgets.")
    if args.target is None and args.scope == "layer":
        parser.error("--scope layer is for --target: a curve has one threshold for all layers.")
    if args.sweep is None:
        args.sweep = [] if args.budgets else thresholds(DEFAULT_SWEEP)
    with ending_plainly(parser.prog):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    from megatron_dynmoe.use.load import be_quiet, in_our_format, load_config

    be_quiet()
    load_config(args.model)  # refuses code from a hub, before the folder is converted
    _check_target_folder(args)
    # Beside the output, so that files can be moved there.
    beside = None if args.output is None else args.output.absolute().parent
    with in_our_format(args.model, beside=beside) as folder:
        config = load_config(folder)
        _check_model(config, args)
        passes = _Passes(folder, config, args)
        for threshold in args.sweep:
            passes.measure_at(threshold, f"threshold {threshold:g}")
        curve = passes.find_curve(args.budgets) if args.budgets else None
        found = None if args.target is None else passes.find(args.target, args.scope, "target")
        if found is not None and isinstance(found.threshold, list):
            for layer, value in enumerate(found.threshold, 1):
                if value is not None:
                    print(f"  layer {layer}: threshold {value:g}")
        print()
        if curve is not None and (note := curve.note()):
            print(f"note: {note}", file=sys.stderr)
        if args.in_place or args.output is not None:
            written = _write(args, folder, found, [] if curve is None else curve.points)
            print(f"written: {written / 'config.json'}")
        else:
            print("nothing was written: give --in-place, or --output for a copy")


class _Passes:
    """Passes of one model over one text, each of which is a row of the table."""

    def __init__(self, folder: Path, config: Any, args: argparse.Namespace) -> None:
        """Load model and text, and measure the model as it is."""
        from megatron_dynmoe.use import calibrate
        from megatron_dynmoe.use.load import check_ids, default_device, load_model, load_tokenizer

        self._tokens_NS = calibrate.read_tokens(
            args.data,
            load_tokenizer(folder),
            num_tokens=args.tokens,
            sequence_length=args.sequence_length or min(config.max_position_embeddings, 2048),
            text_key=args.json_keys,
        )
        check_ids(int(self._tokens_NS.max()), config)
        device = args.device or default_device()
        self._model = load_model(folder, config, dtype=args.dtype, device=device)
        self._config, self._batch_size = self._model.config, args.batch_size
        num_sequences, num_tokens = len(self._tokens_NS), self._tokens_NS.numel()
        print(f"{' '.join(args.data)}: {num_tokens:,} tokens in {num_sequences:,} sequences\n")
        self._table = _Table()
        own = _describe(self._config)
        self._latest = self._measure(own)
        self._table.add(f"{own} (own)", self._latest)
        if args.max_experts_per_token is not None:
            self._config.inference_max_experts_per_token = args.max_experts_per_token

    def measure_at(self, threshold: Any, label: str) -> None:
        """Measure the model with this threshold."""
        self._table.add(label, self._measure(label, threshold))

    def find(self, goal: float, scope: str, what: str) -> Any:
        """Return the :class:`Calibration` for a mean number of experts."""
        from megatron_dynmoe.use import calibrate

        found = calibrate.calibrate(
            lambda threshold, label: self._measure(label, threshold),
            self._latest,
            goal,
            scope=scope,
            cap=calibrate.max_experts(self._config),
            sparse=[kind == "sparse" for kind in self._config.mlp_layer_types],
            name=f"{what} {goal:g}",
        )
        self._latest = found.measurement  # the next goal is likely near
        self._table.add(_describe(self._config), self._latest, f"  <- {what} {goal:g}")
        return found

    def find_curve(self, budgets: Sequence[float]) -> Any:
        """Return the :class:`MeasuredCurve` of budgets, with the points between that it needs."""
        from megatron_dynmoe.use.budgets import points_of, refine

        def measure_between(threshold: Any, label: str) -> Any:
            measured = self._measure(label, threshold)
            self._table.add(_describe(self._config), measured, f"  {label}")
            return measured

        points = points_of([self.find(budget, "global", "budget") for budget in budgets])
        return refine(points, measure_between)

    def _measure(self, label: str, threshold: Any = None) -> Any:
        """Return the :class:`Measurement` of one pass; None: with the model's own threshold."""
        from megatron_dynmoe.use import calibrate

        if threshold is not None:
            calibrate.set_threshold(self._config, threshold)
        return calibrate.measure(self._model, self._tokens_NS, self._batch_size, label)


def _check_model(config: Any, args: argparse.Namespace) -> None:
    """Refuse what this model cannot have, before its weights are loaded."""
    from megatron_dynmoe.use.calibrate import check_routing

    check_routing(config)
    capped = copy.copy(config)
    if args.max_experts_per_token is not None:
        if args.max_experts_per_token > config.num_experts:
            raise UsageError(
                f"--max-experts-per-token is {args.max_experts_per_token}: the model has "
                f"{config.num_experts} experts"
            )
        capped.inference_max_experts_per_token = args.max_experts_per_token
    _check_goals(capped, args)
    positions = config.max_position_embeddings
    if (args.sequence_length or 0) > positions:
        raise UsageError(
            f"--sequence-length is {args.sequence_length}: the model has {positions} positions"
        )


def _check_goals(config: Any, args: argparse.Namespace) -> None:
    """Refuse a target or a budget that this model cannot have, before anything is measured."""
    from megatron_dynmoe.use.calibrate import check_target

    if args.target is not None:
        check_target(config, args.target)
    elif config.routing == "top_k":
        raise UsageError(
            f"--budgets: every token of this model uses {config.num_experts_per_tok} experts, "
            "and a curve needs a model with a threshold: give it one, too, with --target "
            f"{config.num_experts_per_tok}"
        )
    for budget in args.budgets:
        check_target(config, budget, "--budgets")
    own = config.inference_experts_per_token
    if args.target is None and own is not None and not (args.budgets[0] <= own <= args.budgets[-1]):
        raise UsageError(
            f"--budgets: the model's config.json asks for {own:g} experts per token "
            f"(inference_experts_per_token), which no curve from {args.budgets[0]:g} to "
            f"{args.budgets[-1]:g} has: measure that far, or take it out of the file"
        )


def _write(args: argparse.Namespace, folder: Path, found: Any, curve: Sequence[Any]) -> Path:
    """Write into the model's own folder, or into a full copy that appears once it is complete."""
    from megatron_dynmoe.storage.atomic import new_folder
    from megatron_dynmoe.use.calibrate import write_calibration

    record = (found, args.max_experts_per_token, _data_name(args.data), curve)
    if args.in_place:
        write_calibration(folder, *record)
        return folder
    with new_folder(args.output, overwrite=None) as partial:
        if folder == args.model:
            shutil.copytree(folder, partial, dirs_exist_ok=True)  # links become files
        else:
            for file in folder.iterdir():  # the conversion made these
                file.rename(partial / file.name)
        write_calibration(partial, *record)
    return args.output


def _data_name(data: list[str]) -> str:
    """The name of the text in the record."""
    more = f" and {len(data) - 1} more" if len(data) > 1 else ""
    return Path(data[0]).name + more


def _check_target_folder(args: argparse.Namespace) -> None:
    """Refuse what would otherwise fail only after the last pass."""
    if args.output is not None:
        check_parent(args.output)
        check_new_folder(args.output, overwrite=None)
    if not args.in_place:
        return
    if (format := format_in(args.model)) is not OURS:
        raise UsageError(
            f"--in-place: a folder of format {format.name} has no place for what a calibration "
            "finds: give --output for a copy in our format"
        )
    if not os.access(args.model, os.W_OK):
        raise UsageError(f"--in-place: folder {args.model} cannot be written to: give --output")


class _Table:
    """A table that is printed row by row, because a row may take minutes."""

    def __init__(self) -> None:
        self._own_loss: float | None = None
        print(
            f"{'setting':<24}{'experts/token':>14}{'loss, nats':>12}{'vs own':>9}{'perplexity':>12}"
        )

    def add(self, setting: str, measured: Any, remark: str = "") -> None:
        if self._own_loss is None:
            self._own_loss = measured.loss
        print(
            f"{setting:<24}{measured.experts:>14.3f}{measured.loss:>12.4f}"
            f"{measured.loss - self._own_loss:>+9.4f}{measured.perplexity:>12.2f}{remark}",
            flush=True,
        )


def _describe(config: Any) -> str:
    if config.routing == "top_k":
        return f"top-{config.num_experts_per_tok}"
    if config.inference_experts_per_token is not None:
        return f"budget {config.inference_experts_per_token:g}"
    threshold = (
        config.threshold if config.inference_threshold is None else config.inference_threshold
    )
    if isinstance(threshold, list):
        different = {value for value in threshold if value is not None}
        if len(different) > 1:
            return "threshold by layer"
        threshold = different.pop()
    return f"threshold {threshold:.6g}"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        description=__doc__,
        example="dynmoe calibrate --model my-model --data examples/data/*.gz --budgets 1,1.5,2,3,4 "
        "--in-place",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported folder")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="real text, read in this order up to --tokens: files, folders or quoted globs; JSON "
        "lines or .txt (plain, .gz, .zst), or .parquet",
    )
    add_key_flag(parser)
    parser.add_argument(
        "--target",
        type=float,
        metavar="K",
        help="mean experts per token, for which the model's own threshold is set",
    )
    parser.add_argument(
        "--budgets",
        type=budgets,
        default=[],
        metavar="K,...",
        help="mean experts per token, such as 1,1.5,2,3,4, for each of which a point of the curve "
        "is measured; the model's own threshold stays, unless --target is given, too",
    )
    parser.add_argument(
        "--scope",
        choices=("global", "layer"),
        default="global",
        help="of --target: one threshold for the mean over layers (default), or one for each "
        "layer's own mean",
    )
    parser.add_argument(
        "--max-experts-per-token",
        type=number(int, 1),
        metavar="K",
        help="cap in inference, for the sweep and the result (default: the model's)",
    )
    parser.add_argument(
        "--sweep",
        type=thresholds,
        metavar="T,...",
        help=f"thresholds to measure as well (default: {DEFAULT_SWEEP}; with --budgets none), or "
        "none",
    )
    parser.add_argument(
        "--tokens", type=number(int, 1), default=65536, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--batch-size", type=number(int, 1), default=4, help="default: %(default)s")
    parser.add_argument(
        "--sequence-length",
        type=number(int, 2),  # one token to read, one to predict
        metavar="S",
        help="default: the model's positions, at most 2048",
    )
    add_runtime_flags(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, metavar="DIR", help="write a copy with the threshold")
    where.add_argument("--in-place", action="store_true", help="write into the model's config.json")
    return parser
