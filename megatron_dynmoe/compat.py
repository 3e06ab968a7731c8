"""The only place that touches upstream by version or patch.

Each patch states what upstream does, in which file, and why it does not do here. A test fails when
upstream changes so that a patch is no longer needed.
"""

from __future__ import annotations

import importlib.util


def install() -> None:
    """Apply the patches that every run under Megatron 0.19 needs, once."""
    _use_the_packaged_dataset_helpers()


def _use_the_packaged_dataset_helpers() -> None:
    """``megatron/core/datasets/utils.py`` runs ``make`` where the package ships no Makefile.

    The wheel brings the compiled helper, so there is nothing to compile, yet
    ``megatron.training.initialize`` ends the process when ``make`` fails.
    """
    import megatron.core.datasets.utils as dataset_utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        dataset_utils.compile_helpers = lambda: None
