"""More tokens: does DTop-p's lead over top-k widen?

    python -m study.tokens [--only NAME ...] [--seeds N] [--list] [--quick]

The same model is trained on once, twice and four times the tokens, each with a learning rate that
decays over its own training. The text has 1.6 M tokens, so the longest training reads it between
two and three times.
"""

from __future__ import annotations

from study.axes import Axis, Point
from study.parts import end


def _point(tokens: int) -> Point:
    return Point(f"{tokens} x the tokens", at=tokens, name=f"x{tokens}", tokens=tokens)


PART = Axis.of(
    "tokens",
    __doc__,
    [Point("the study's tokens", at=1), _point(2), _point(4)],
    claim=(
        "Its lead over top-k widens with more tokens.",
        "so, at 100 and 300 B (no figures at hand)",
    ),
)

if __name__ == "__main__":
    end(PART)
