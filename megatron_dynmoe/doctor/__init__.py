"""Checks a machine, its software and its data before a run: ``-m megatron_dynmoe.doctor``.

The names of folders and token files enter, if any; a table leaves, one line for each check, with a
remedy for what is not right. ``checkpoint/`` looks into checkpoints.

A child process (:mod:`.software`) runs every check that imports torch. If a library hangs or
crashes, that costs one line of the table, and the doctor goes on.
"""

from __future__ import annotations
