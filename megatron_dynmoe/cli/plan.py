"""``dynmoe plan``: says what a run takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_dynmoe.planning.gpus import GPUS
from megatron_dynmoe.settings.messages.command_line import (
    CommandParser,
    UsageError,
    ending_plainly,
    number,
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Plan and print; exit with 0, 1 (it does not fit) or 2 (it cannot work)."""
    parser = _parser()
    args, flags = parser.parse_known_args(argv)
    _check_together(parser, args)
    if args.dry_run:
        _dry_run(parser.prog, args, flags)
    from megatron_dynmoe.jobs.display import describe
    from megatron_dynmoe.jobs.plan import make_plan

    with ending_plainly(parser.prog, "no plan was made"):
        try:
            plan = make_plan(
                args.recipe,
                flags,
                args.gpus,
                GPUS[args.gpu],
                tokens=args.tokens,
                utilization=0.4 if args.utilization is None else args.utilization,
                experts_per_token=args.experts_per_token,
            )
        except ValueError as error:  # each is about a flag or a setting
            raise UsageError(str(error)) from None
        print(json.dumps(to_json(plan), indent=2) if args.json else describe(plan), flush=True)
    sys.exit(0 if plan.fits else 1)


def _check_together(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that do not belong to what is asked for."""
    if args.dry_run:
        for name in ("tokens", "utilization"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} is given, but --dry-run looks at one step: leave it out.")
        return
    for name in ("rank", "counts", "imbalance", "kernels"):
        if getattr(args, name) is not None:
            parser.error(f"--{name} belongs to --dry-run, which is not given: add it.")
    missing = [f"--{name}" for name in ("gpus", "gpu") if getattr(args, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _dry_run(prog: str, args: argparse.Namespace, flags: Sequence[str]) -> NoReturn:
    from megatron_dynmoe.dry_run import machine

    settings = {"both": ("0", "1"), None: (None,)}.get(args.kernels, (args.kernels,))
    with ending_plainly(prog, "nothing was counted"):
        machine.check()
        from megatron_dynmoe.dry_run.display import describe
        from megatron_dynmoe.dry_run.launch import dry_run

        try:
            runs = [
                dry_run(
                    args.recipe,
                    flags,
                    args.gpus,
                    GPUS[args.gpu or "h200-141g"],
                    rank=args.rank,
                    counts=args.counts or "mean",
                    imbalance=args.imbalance or 1.0,
                    experts_per_token=args.experts_per_token,
                    kernels=setting,
                )
                for setting in settings
            ]
        except ValueError as error:  # each is about a flag or a setting
            raise UsageError(str(error)) from None
        if args.json:
            print(json.dumps([dry_run_to_json(run) for run in runs], indent=2), flush=True)
        else:
            print("\n\n".join(map(describe, runs)), flush=True)
    sys.exit(0 if all(run.fits for run in runs) else 1)


def dry_run_to_json(run: Any) -> dict[str, Any]:
    """The fields of a dry run and the values that follow from them."""
    fields = dataclasses.asdict(run)
    fields["gpu"] = run.gpu._asdict()
    derived = {"fits": run.fits, "peak": run.result.peak}
    return fields | derived | {"formula_total": run.formula and run.formula.total}


def to_json(plan: Any) -> dict[str, Any]:
    """The plan's fields and the values that follow from them."""
    derived = {"fits": plan.fits, "tokens": plan.tokens, "hours": plan.hours}
    totals = {
        f"{name}_total": getattr(plan, name).total for name in ("mean", "first_steps", "worst_case")
    }
    fields = dataclasses.asdict(plan)
    fields["gpu"] = plan.gpu._asdict()
    return fields | derived | totals


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="dynmoe plan",
        usage="%(prog)s RECIPE --gpus N --gpu KIND [options] [flags of the training ...]",
        description="What a run takes, before it has a GPU: parameters, memory, FLOPs, hours.",
        epilog="Further flags override the recipe's. See docs/planning.md for what is exact.",
        example="dynmoe plan dtop_p_16e --gpus 16 --gpu a800-80g",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a name, or the path of a .flags file")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu", choices=GPUS, metavar="KIND", help=", ".join(GPUS))
    parser.add_argument("--tokens", type=float, metavar="N", help="length of the run, e.g. 100e9")
    parser.add_argument(
        "--utilization",
        type=float,
        metavar="SHARE",
        help="model FLOPs over the GPUs' peak (0.4, an assumption)",
    )
    parser.add_argument(  # its name in version 0.1
        "--utilisation", dest="utilization", type=float, default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument(
        "--experts-per-token",
        type=float,
        metavar="MEAN",
        help="measured in a trial, if the routing does not set it (a fixed threshold)",
    )
    parser.add_argument("--json", action="store_true", help="for scripts; bytes, not GB")
    dry = parser.add_argument_group(
        "dry run: two real steps of one rank, on a GPU that does not exist",
        "It takes up to a minute of processor time and 1 GB of memory.",
    )
    dry.add_argument("--dry-run", action="store_true", help="count what a step does")
    dry.add_argument("--rank", type=int, metavar="N", help="of --gpus; default: one of the fullest")
    dry.add_argument(
        "--counts",
        choices=("mean", "first", "cap"),
        help="experts per token: the run's mean (default), its first steps', or the cap",
    )
    dry.add_argument(
        "--imbalance",
        type=number(float, 0.01),
        metavar="FACTOR",
        help="how many times their share the experts of this GPU get (1)",
    )
    dry.add_argument(
        "--kernels",
        choices=("0", "1", "fused", "both"),
        help="DYNMOE_KERNELS, or both: 0 and 1; default: as it is set",
    )
    return parser
