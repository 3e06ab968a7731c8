"""Finer experts at equal cost: does DTop-p's lead over top-k widen?

    python -m study.granularity [--only NAME ...] [--seeds N] [--list] [--quick]

There are 8 experts of 512 to 64 experts of 64, of which a token uses one in eight, so parameters
and compute are the same at all points. At 8E1A both routings give every token one expert and
differ only in its weight (top-1's is its probability, DTop-p's is 1), so this point is not part of
the trend.
"""

from __future__ import annotations

from study.axes import Axis, Point
from study.parts import end

_WIDTH = 512  # of a token's experts together


def _point(k: int) -> Point:
    num_experts, ffn = 8 * k, _WIDTH // k
    return Point(
        f"{num_experts}E{k}A",
        at=k,
        experts=k,
        name=f"{num_experts}e{k}a",
        flags=f"--num-experts {num_experts} --ffn-hidden-size {ffn}",
        num_seeds=2,
        in_trend=k > 1,
    )


PART = Axis.of(
    "granularity",
    __doc__,
    [_point(1), Point("16E2A", at=2), _point(4), _point(8)],
    claim=(
        "Its lead over top-k widens with finer experts.",
        "1.9 points at 64E8A, 2.1 at 128E16A (average of 13 tasks)",
    ),
)

if __name__ == "__main__":
    end(PART)
