"""More experts of which a token uses two: does DTop-p's lead over top-k widen?

    python -m study.experts [--only NAME ...] [--seeds N] [--list] [--quick]

There are 8 to 64 experts of the same size, so parameters grow and compute does not. DTop-p's
authors have no such axis: their finer experts are more and smaller at once.
"""

from __future__ import annotations

from study.axes import Axis, Point
from study.parts import end
from study.variants import NUM_EXPERTS


def _point(num_experts: int) -> Point:
    return Point(
        f"{num_experts} experts",
        at=num_experts,
        name=f"{num_experts}e2a",
        flags=f"--num-experts {num_experts}",
        num_seeds=2,
    )


PART = Axis.of(
    "experts",
    __doc__,
    [_point(8), Point(f"{NUM_EXPERTS} experts", at=NUM_EXPERTS), _point(32), _point(64)],
)

if __name__ == "__main__":
    end(PART)
