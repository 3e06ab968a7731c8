"""``common/__init__.py``."""

from . import recipe

__all__ = ["recipe"]
