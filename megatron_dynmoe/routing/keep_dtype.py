"""A module whose buffers are never cast. Exports ship with this file."""

from __future__ import annotations

from typing import Any, Self

from torch import nn


class KeepDtype(nn.Module):
    """A module whose own buffers move between devices but are never cast.

    Megatron's Float16Module casts every floating-point buffer. Casting back afterwards is too
    late: by then bf16 has rounded a threshold of 0.2374 to 0.23730469.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
