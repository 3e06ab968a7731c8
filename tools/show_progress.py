"""Shorten Megatron's log lines on stdin to one readable line per log interval."""

import sys
from pathlib import Path

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_dynmoe.runs.progress_lines import main
from megatron_dynmoe.settings.messages.command_line import CommandParser

if __name__ == "__main__":
    CommandParser(description=__doc__).parse_args()
    main()
