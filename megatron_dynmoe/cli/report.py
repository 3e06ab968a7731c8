"""Write summary.json and curves.png of a run, even if it is under way or was cut off."""

from collections.abc import Sequence
from pathlib import Path

from megatron_dynmoe.runs.folder import CURVES, SUMMARY
from megatron_dynmoe.runs.summary import write_summary_and_curves
from megatron_dynmoe.settings.messages.command_line import CommandParser, ending_plainly
from megatron_dynmoe.storage.json_files import measured_json


def main(argv: Sequence[str] | None = None) -> None:
    """Report on the run that the command line names."""
    parser = CommandParser(description=__doc__, example="dynmoe report runs/quickstart")
    parser.add_argument("run", type=Path, help="the folder given to training as --run-dir")
    run = parser.parse_args(argv).run
    with ending_plainly(parser.prog):
        summary = write_summary_and_curves(run)
    print(measured_json(summary), end="")
    print(f"written: {run / SUMMARY} and {run / CURVES}")
