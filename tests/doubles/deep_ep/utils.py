"""Events of a stream. On a CPU there is nothing to wait for."""

from typing import Any


class EventHandle:
    """A recorded event."""


class EventOverlap:
    """An event that the current stream may wait for (deep_ep/utils)."""

    def __init__(self, event: Any = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        """Return at once."""
