"""Larger models: does DTop-p's lead over top-k widen?

    python -m study.size [--only NAME ...] [--seeds N] [--list] [--quick]

Three models have 16 experts each. They differ in layers, hidden size and the size of an expert,
which is twice the hidden size. The axis is that of active parameters without embeddings. Learning
rate and tokens are the same for all, which need not be the best for each.
"""

from __future__ import annotations

from study.axes import Axis, Point
from study.parts import end
from study.variants import SEEDS, TARGET


def _active(layers: int, hidden: int) -> float:
    """Parameters that a token uses outside embeddings: attention, and experts of 3 matrices."""
    return layers * hidden * (4 * hidden + 3 * 2 * hidden * TARGET)


def _point(layers: int, hidden: int, name: str = "") -> Point:
    active = _active(layers, hidden)
    flags = (
        f"--num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {2 * hidden} "
        f"--num-attention-heads {hidden // 32}"
    )
    title = f"{active / 1e6:.1f} M active: {layers} layers of {hidden}"
    return Point(title, at=active, name=name, flags=flags if name else "", num_seeds=SEEDS)


PART = Axis.of(
    "size",
    __doc__,
    [_point(4, 64, "small"), _point(6, 128), _point(8, 192, "large")],
    claim=(
        "Its lead over top-k widens with the model.",
        "so, from 0.4 over 1.3 to 2.4 B parameters (no figures at hand)",
    ),
)

if __name__ == "__main__":
    end(PART)
