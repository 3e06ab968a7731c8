"""Measures a whole model: counts its routing on all text, and sweeps over thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from megatron_dynmoe.analysis.counting.collect import Collected, collect
from megatron_dynmoe.analysis.counting.counts import LOSS_UNIT, Shape, add_up
from megatron_dynmoe.analysis.counting.tokens import Letters
from megatron_dynmoe.analysis.counting.windows import Window
from megatron_dynmoe.use.calibrate import set_threshold

# The thresholds to try if none are given. The first are always tried, the others until the model's
# own number of experts lies between the fewest and the most. At 0 a token uses one, at 1 all.
_ALWAYS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_BELOW = (0.02, 0.01, 0.0)
_ABOVE = (0.6, 0.7, 0.8, 0.9, 1.0)
_ROUTING = (
    *("routing", "num_experts_per_tok", "threshold"),
    *("inference_threshold", "inference_experts_per_token"),
)


class SweepWindows:
    """Passes windows on, and keeps those that the sweep reads again.

    Every group gets an equal part of the limit, but the number of groups is known only at the end.
    So this keeps the first windows of each group up to the whole limit, and cuts them down later.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._kept: dict[str, list[Window]] = {}

    def passing(self, windows: Iterable[Window]) -> Iterator[Window]:
        for window in windows:
            kept = self._kept.setdefault(window.group, [])
            if sum(len(one.tokens) for one in kept) < self._num_tokens:
                kept.append(window)
            yield window

    def chosen(self) -> list[Window]:
        """Windows of all groups in turn, until the limit is reached; at least one window."""
        windows: list[Window] = []
        tokens = 0
        for number in range(max(map(len, self._kept.values()), default=0)):
            for kept in self._kept.values():
                if number < len(kept) and (not windows or tokens < self._num_tokens):
                    windows.append(kept[number])
                    tokens += len(kept[number].tokens)
        return windows


def sweep(
    model: Any,
    windows: Sequence[Window],
    shape: Shape,
    letters: Letters,
    thresholds: Sequence[float] | None = None,
    on_tokens: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """Mean experts per token and loss with the model's own routing and with other thresholds.

    The model's own setting is restored. A cap on the experts of a token stays in force.

    Args:
        model, windows, shape, letters, on_tokens: as for :func:`collect`.
        thresholds: in increasing order. The default is 0.05 to 0.5, and as many more as it takes
            until the model's own number of experts per token lies between the fewest and the most.

    Returns:
        ``tokens``, ``own``, ``as_trained`` (whether own is the routing of the training, not one set
        for inference) and ``points``. A point has threshold (None: by layer, or top-k), experts,
        by_layer and loss (nats per predicted token, None if no token was predicted).
    """
    config = model.config
    own = {name: vars(config)[name] for name in _ROUTING}

    def point(threshold: float | None) -> dict[str, Any]:
        total = add_up(
            collect(model, windows, shape, letters, on_tokens=on_tokens).groups,
        )
        by_layer = (total.load_LE.sum(axis=1) / total.tokens).tolist()
        return {
            "threshold": threshold,
            "experts": float(np.mean(by_layer)),
            "by_layer": by_layer,
            "loss": total.loss * LOSS_UNIT / total.predicted if total.predicted else None,
        }

    def point_at(threshold: float) -> dict[str, Any]:
        set_threshold(config, threshold)
        return point(threshold)

    try:
        trained = point(own_threshold(config))
        swept = () if config.rule is not None else thresholds or _ALWAYS  # which has no threshold
        points = [point_at(threshold) for threshold in swept]
        if points and thresholds is None:
            for threshold in _BELOW:
                if points[0]["experts"] < trained["experts"]:
                    break
                points.insert(0, point_at(threshold))
            for threshold in _ABOVE:
                if points[-1]["experts"] > trained["experts"]:
                    break
                points.append(point_at(threshold))
    finally:
        for name, value in own.items():
            setattr(config, name, value)
    return {
        "tokens": sum(len(window.tokens) for window in windows),
        "own": trained,
        "as_trained": not is_set_afterwards(config),
        "points": points,
    }


def own_threshold(config: Any) -> float | None:
    """The threshold of all layers in inference; None if layers differ, and for top-k."""
    if config.routing == "top_k" or config.rule is not None:
        return None
    layers = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    different = {config.threshold_and_cap(layer, training=False)[0] for layer in layers}
    return different.pop() if len(different) == 1 else None


def is_set_afterwards(config: Any) -> bool:
    """Whether a threshold or a cap for inference was set or calibrated after the training."""
    settings = (
        *("inference_threshold", "inference_experts_per_token"),
        *("inference_max_experts_per_token", "calibration"),
    )
    return any(getattr(config, name, None) is not None for name in settings)


def texts_of(
    tokenizer: Any, collected: Collected, text: Callable[[Any, int], str]
) -> dict[int, str]:
    """The text of every token that was counted."""
    seen = np.flatnonzero(add_up(collected.groups).vocab_V)
    return {int(token): text(tokenizer, int(token)) for token in seen}
