"""Shorten Megatron's log lines on stdin to one readable line per log interval."""

from megatron_dynmoe.runs.progress_lines import main
from megatron_dynmoe.settings.command_line import CommandParser

CommandParser(description=__doc__).parse_args()
main()
