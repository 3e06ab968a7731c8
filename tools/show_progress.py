"""Shorten Megatron's log lines on stdin to one readable line per log interval."""

from megatron_dynmoe.progress_lines import main

main()
