"""Megatron's command line, parsed more than once in a process."""

import functools


@functools.cache
def keep_help_texts() -> None:
    """Have Megatron read its help texts from its own source once, and not with each parser."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    read = ArgumentGroupFactory._get_field_docstrings
    any_factory = object.__new__(ArgumentGroupFactory)
    ArgumentGroupFactory._get_field_docstrings = staticmethod(
        functools.cache(functools.partial(read, any_factory))
    )
