"""Write summary.json and curves.png of a run, also one that is under way or was cut off."""

import json
from pathlib import Path

from megatron_dynmoe.runs.folder import CURVES, SUMMARY
from megatron_dynmoe.runs.report import write_report
from megatron_dynmoe.settings.command_line import CommandParser


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder that training was given as --run-dir")
    run = parser.parse_args().run
    try:
        summary = write_report(run)
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(json.dumps(summary, indent=2))
    print(f"written: {run / SUMMARY} and {run / CURVES}")


if __name__ == "__main__":
    main()
