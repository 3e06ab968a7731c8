"""Find the threshold that gives an exported model a target mean of experts per token on real text.

It works on models trained with a threshold and on models trained with top-k, folders of other
formats (Mixtral) among them. It prints threshold, mean experts, loss and perplexity over a sweep.
With --budgets it measures a curve, by which every later call can ask for another number of experts
(dynmoe generate --budget). It writes the result into config.json with --in-place or --output;
without one of them, it writes nothing.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dynmoe.cli.reading import add_key_flag
from megatron_dynmoe.conversion.formats import OURS, format_in
from megatron_dynmoe.settings.messages.command_line import (
    CommandParser,
    add_runtime_flags,
    budgets,
    ending_plainly,
    number,
    thresholds,
)

DEFAULT_SWEEP = "0.1,0.2,0.3,0.4,0.5"  # the values of Dynamic MoE's Table 7 and Figure 4


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate as the command line says."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.target is None and not args.budgets:
        parser.error("give --target or --budgets.")
    if args.sweep is None:
        args.sweep = [] if args.budgets else thresholds(DEFAULT_SWEEP)
    with ending_plainly(parser.prog):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    from megatron_dynmoe.use import calibrate as calibration
    from megatron_dynmoe.use.budgets import points_of, refine
    from megatron_dynmoe.use.load import (
        be_quiet,
        check_ids,
        default_device,
        in_our_format,
        load_config,
        load_model,
        load_tokenizer,
    )

    be_quiet()
    load_config(args.model)  # refuses code from a hub, before the folder is converted
    _check_target_folder(args)
    # Beside the output, so that files can be moved there.
    beside = None if args.output is None else args.output.absolute().parent
    with in_our_format(args.model, beside=beside) as folder:
        # 1. Load model and text.
        config = load_config(folder)
        calibration.check_routing(config)
        own_setting, own_cap = _describe(config), config.inference_max_experts_per_token
        if args.max_experts_per_token is not None:
            if args.max_experts_per_token > config.num_experts:
                raise ValueError(
                    f"--max-experts-per-token is {args.max_experts_per_token}: the model has "
                    f"{config.num_experts} experts"
                )
            config.inference_max_experts_per_token = args.max_experts_per_token
        _check_goals(config, args)
        positions = config.max_position_embeddings
        if (args.sequence_length or 0) > positions:
            raise ValueError(
                f"--sequence-length is {args.sequence_length}: the model has {positions} positions"
            )
        tokens_NS = calibration.read_tokens(
            args.data,
            load_tokenizer(folder),
            num_tokens=args.tokens,
            sequence_length=args.sequence_length or min(positions, 2048),
            text_key=args.json_keys,
        )
        check_ids(int(tokens_NS.max()), config)
        model = load_model(folder, config, dtype=args.dtype, device=args.device or default_device())
        config = model.config
        print(
            f"{' '.join(args.data)}: {tokens_NS.numel():,} tokens in {len(tokens_NS):,} sequences\n"
        )

        # 2. Measure the model's own setting, the sweep, then the target.
        table = _Table()
        new_cap = config.inference_max_experts_per_token
        config.inference_max_experts_per_token = own_cap
        start = calibration.measure(model, tokens_NS, args.batch_size, own_setting)
        config.inference_max_experts_per_token = new_cap
        table.add(f"{own_setting} (own)", start)

        def measure_at(threshold: calibration.Threshold, label: str) -> calibration.Measurement:
            calibration.set_threshold(config, threshold)
            return calibration.measure(model, tokens_NS, args.batch_size, label)

        for threshold in args.sweep:
            label = f"threshold {threshold:g}"
            table.add(label, measure_at(threshold, label))

        def find(goal: float, scope: str, what: str) -> calibration.Calibration:
            nonlocal start
            found = calibration.calibrate(
                measure_at,
                start,
                goal,
                scope=scope,
                cap=calibration.max_experts(config),
                sparse=[kind == "sparse" for kind in config.mlp_layer_types],
                name=f"{what} {goal:g}",
            )
            start = found.measurement  # the next goal is likely near
            table.add(_describe(config), start, f"  <- {what} {goal:g}")
            return found

        def measure_between(threshold: calibration.Threshold, label: str) -> Any:
            measured = measure_at(threshold, label)
            table.add(_describe(config), measured, f"  {label}")
            return measured

        curve = []
        if args.budgets:
            budgets = [find(budget, "global", "budget") for budget in args.budgets]
            curve = refine(points_of(budgets), measure_between)
        found = None
        if args.target is not None:
            found = find(args.target, args.scope, "target")
            if isinstance(found.threshold, list):
                for layer, value in enumerate(found.threshold, 1):
                    if value is not None:
                        print(f"  layer {layer}: threshold {value:g}")

        # 3. Write the result.
        print()
        if args.in_place or args.output is not None:
            written = _write(args, folder, found, curve)
            print(f"written: {written / 'config.json'}")
        else:
            print("nothing was written: give --in-place, or --output for a copy")


def _check_goals(config: Any, args: argparse.Namespace) -> None:
    """Refuse a target or a budget that this model cannot have, before anything is measured."""
    from megatron_dynmoe.use.calibrate import check_target

    if args.target is not None:
        check_target(config, args.target)
    elif config.routing == "top_k":
        raise ValueError(
            f"--budgets: every token of this model uses {config.num_experts_per_tok} experts, "
            "and a curve needs a model with a threshold: give it one, too, with --target "
            f"{config.num_experts_per_tok}"
        )
    for budget in args.budgets:
        check_target(config, budget, "--budgets")
    own = config.inference_experts_per_token
    if args.target is None and own is not None and not (args.budgets[0] <= own <= args.budgets[-1]):
        raise ValueError(
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
    with new_folder(args.output, overwrite=False) as partial:
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
    output = args.output
    if args.in_place and (format := format_in(args.model)) is not OURS:
        raise ValueError(
            f"--in-place: a folder of format {format.name} has no place for what a calibration "
            "finds: give --output for a copy in our format"
        )
    if output is not None:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise ValueError(f"--output {output}: it exists and is not empty")
        if not output.absolute().parent.is_dir():
            raise ValueError(f"--output {output}: there is no folder {output.parent}: create it")
    folder = args.model if args.in_place else output and output.absolute().parent
    if folder is not None and not os.access(folder, os.W_OK):
        raise ValueError(f"folder {folder}: it cannot be written to")


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
        help="one threshold for the mean over layers (default), or one for each layer's own mean",
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
