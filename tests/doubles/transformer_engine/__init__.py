"""A double of Transformer Engine: what Megatron-Core 0.19.2 calls of it, in plain PyTorch on a CPU.

It stands for version 2.18.0 and has its names, signatures, limits and results, so that unmodified
Megatron takes its Transformer Engine path without a GPU. Each function cites the file of
the original, below ``transformer_engine/``, whose behavior it stands for. If the original's
result depends on its implementation (the order of a sum, a mask that one kernel reads and another
does not), the double does the same. What the original leaves uninitialized is NaN here. What the
double does not stand for raises :class:`NotStoodFor` instead of returning something.

It imports nothing of Megatron and of this project. ``tests/doubles/test_*.py`` say what holds of
both, and ``make test-te`` asks the original.
"""

from . import common, pytorch

__version__ = "2.18.0"  # that of tests/doubles/transformer_engine-2.18.0.dist-info, too

__all__ = ["common", "pytorch"]
