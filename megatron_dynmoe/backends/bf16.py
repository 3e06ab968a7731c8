"""The cost of a matrix product in bf16 on this CPU.

Processors with AVX-512 BF16 or AMX multiply bf16 faster than float32. Other processors with AVX-512
are a little slower in bf16, and processors without AVX-512 more than a hundred times slower.
"""

from __future__ import annotations

import time

import torch

WIDTH = 192  # 14 MFLOP: 0.04 s at 0.4 GFLOP/s, the slowest processor measured
SLOW = 4.0  # nobody trains in bf16 on purpose if it is this many times slower than float32


def slowdown() -> float:
    """Measure how many times longer a product takes in bf16 than in float32, in at most 0.1 s."""
    seconds = [_seconds(dtype) for dtype in (torch.bfloat16, torch.float32)]
    return seconds[0] / seconds[1]


def warning(factor: float) -> str | None:
    """Return a warning for a user who trains with ``--bf16``, or None if that is not slow here."""
    if factor < SLOW:
        return None
    return (
        f"WARNING: --bf16 is given, and this CPU multiplies bf16 {factor:.0f} times slower than "
        "float32: leave --bf16 out to train in float32 here."
    )


def _seconds(dtype: torch.dtype) -> float:
    matrix = torch.ones(WIDTH, WIDTH, dtype=dtype)
    torch.mm(matrix, matrix)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        taken.append(time.perf_counter() - start)
    return min(taken)
