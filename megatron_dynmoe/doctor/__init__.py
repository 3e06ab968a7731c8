"""Looks at a machine, its software and its data before a run does: ``-m megatron_dynmoe.doctor``.

What imports torch runs in a child process (:mod:`.software`), so that a library that hangs or
crashes costs a line of the table and not the doctor.
"""

from __future__ import annotations
