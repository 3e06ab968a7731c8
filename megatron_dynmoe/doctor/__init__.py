"""Checks a machine, its software and its data before a run: ``-m megatron_dynmoe.doctor``.

A child process (:mod:`.software`) runs every check that imports torch. If a library hangs or
crashes, that costs one line of the table, and the doctor goes on.
"""

from __future__ import annotations
