"""Draw several runs in one picture: loss, experts per token and threshold; see docs/monitoring.md.

It draws loss against tokens and against the floating-point operations that the experts took, as
measured: a model that uses more experts per token moves to the right.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_dynmoe.runs.drawing import overlay
from megatron_dynmoe.settings.messages.command_line import CommandParser, UsageError, ending_plainly


def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    parser = CommandParser(
        description=__doc__, example="dynmoe plot runs/quickstart runs/other --output both.png"
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folder given to training as --run-dir; the run may still be under way",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs.png"),
        metavar="FILE",
        help="a .png, .svg or .pdf (default: %(default)s)",
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="TEXT", help="one per run (default: the folders' names)"
    )
    args = parser.parse_args(argv)
    with ending_plainly(parser.prog):
        overlay.check_output(args.output)
        labels = args.labels or overlay.labels_of(args.runs)
        if len(labels) != len(args.runs):
            raise UsageError(
                f"--labels are {len(labels)} and the runs are {len(args.runs)}: give one a run."
            )
        runs = [overlay.read(run, label) for run, label in zip(args.runs, labels, strict=True)]
        overlay.draw(args.output, runs)
    for run in runs:
        experts = "dense" if run.experts is None else f"{run.experts[-1]:.2f} experts per token"
        print(f"{run.label}: {run.tokens[-1]:,.0f} tokens, loss {run.loss[-1]:.3f}, {experts}")
    print(f"written: {args.output}")
