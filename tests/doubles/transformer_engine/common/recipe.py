"""``common/recipe/__init__.py``: names only, because low precision is not stood for."""

from typing import Any

from ..not_stood_for import NotStoodFor


class DelayedScaling:
    """Megatron derives a class from it when it is imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotStoodFor("FP8")
