"""``dynmoe plan``: says what a run takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_dynmoe.planning.gpus import GPUS
from megatron_dynmoe.settings.command_line import CommandParser, ending_plainly


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Plan and print; exit with 0, 1 (it cannot work or does not fit) or 2 (usage)."""
    parser = _parser()
    args, flags = parser.parse_known_args(argv)
    from megatron_dynmoe.jobs.display import describe
    from megatron_dynmoe.jobs.plan import make_plan

    with ending_plainly(parser.prog, "no plan was made"):
        plan = make_plan(
            args.recipe,
            flags,
            args.gpus,
            GPUS[args.gpu],
            tokens=args.tokens,
            utilization=args.utilization,
            experts_per_token=args.experts_per_token,
        )
        print(json.dumps(to_json(plan), indent=2) if args.json else describe(plan), flush=True)
    sys.exit(0 if plan.fits else 1)


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
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu", choices=GPUS, required=True, metavar="KIND", help=", ".join(GPUS))
    parser.add_argument("--tokens", type=float, metavar="N", help="length of the run, e.g. 100e9")
    parser.add_argument(
        "--utilization",
        type=float,
        default=0.4,
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
    return parser
