"""``pytorch/cross_entropy.py``. Megatron 0.19.2 refuses the flags that would call it."""

from typing import Any

from ..not_stood_for import NotStoodFor


def parallel_cross_entropy(*args: Any, **kwargs: Any) -> Any:
    """With ``--cross-entropy-fusion-impl te``."""
    raise NotStoodFor("parallel_cross_entropy")
