"""``pytorch/quantization.py`` (``pytorch/fp8.py`` is its old name): low precision, always off."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ..not_stood_for import refuse


class FP8GlobalStateManager:
    """Whether low precision is on in this place of the program."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Low precision is never on."""
        return False


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, **kwargs: Any) -> Iterator[None]:
    """Switch low precision for a while; here it can only be switched off."""
    refuse(fp8_autocast=enabled)
    yield


@contextlib.contextmanager
def fp8_model_init(enabled: bool = True, **kwargs: Any) -> Iterator[None]:
    """Build parameters in low precision; here they never are."""
    refuse(fp8_model_init=enabled)
    yield
