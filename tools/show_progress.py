"""Shorten Megatron's log lines on stdin to one readable line per log interval."""

from megatron_dynmoe.command_line import CommandParser
from megatron_dynmoe.progress_lines import main

CommandParser(description=__doc__).parse_args()
main()
