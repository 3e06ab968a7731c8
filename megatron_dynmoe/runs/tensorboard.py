"""What TensorBoard shows beside single values: a page of charts, and a heat map of layers."""

from __future__ import annotations

import math
from typing import Any

from megatron_dynmoe.moe.rules import RULES
from megatron_dynmoe.runs import metric_names as names
from megatron_dynmoe.runs.drawing.curves import MAX_COLUMNS, draw_layers
from megatron_dynmoe.settings.config import DynMoEConfig


def tensorboard_layout(
    dynmoe: DynMoEConfig, has_ranks: bool = False
) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's page "custom scalars": groups of charts, each of tags (regular expressions).

    Args:
        has_ranks: see :attr:`~megatron_dynmoe.runs.metrics.RoutingSummary.has_ranks`.
    """

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    def by_layer(quantity: str) -> list[Any]:
        return chart(names.of_layer(quantity, r"\d+"))

    experts = [names.EXPERTS, names.VALIDATION_EXPERTS]
    if dynmoe.target_experts_per_token is not None:
        experts.append(names.TARGET)
    routing = {
        "experts per token": chart(*experts),
        "standard deviation of experts over tokens": chart(
            names.STD_EXPERTS, names.VALIDATION_STD_EXPERTS
        ),
    }
    knob = knob_of(dynmoe)
    if knob is not None:
        routing[knob] = chart(names.THRESHOLD)
    if dynmoe.max_experts_per_token is not None:
        routing["share of tokens at the cap"] = chart(names.SHARE_AT_CAP)
    layers = {"experts per token": by_layer(names.EXPERTS_OF_LAYER)}
    if dynmoe.normalization == "drn":
        layers["theta of the normalization"] = by_layer(names.THETA_OF_LAYER)
    if dynmoe.scope == "layer":
        layers[knob or ""] = by_layer(names.THRESHOLD_OF_LAYER)
    ranks = {
        "experts per token, times busiest rank over mean": chart(names.BUSIEST_RANK),
        "rows of the busiest rank": chart(names.BUSIEST_RANK_ROWS),
        "share of the step waiting for it": chart(names.SHARE_WAITING),
    }
    return {
        "training": {
            "loss": chart(names.LOSS, names.VALIDATION_LOSS),
            "gradient norm": chart(names.GRADIENT_NORM),
            "learning rate": chart(names.LEARNING_RATE),
        },
        "routing": routing,
        "routing by layer": layers,
        "balance and losses of the router": {
            "busiest expert over mean": chart(
                names.MAX_OVER_MEAN_LOAD, names.HIGH_LOAD, names.MEDIAN_LOAD
            ),
            "MaxVio": chart(names.MAX_VIOLATION),
            "balance loss": chart(names.BALANCE_LOSS),
            "dynamic loss (entropy)": chart(names.DYNAMIC_LOSS),
        },
        **({"expert-parallel ranks": ranks} if has_ranks else {}),
        "speed": {
            "tokens per second": chart(names.TOKENS_PER_SECOND),
            "TFLOP/s from measured experts": chart(names.TFLOPS_PER_SECOND),
        },
    }


class LayerHistory:
    """Experts per token by layer since this process started, in a bounded number of columns."""

    def __init__(self) -> None:
        self._columns: list[tuple[int, list[float]]] = []

    def add(self, iteration: int, experts_by_layer: list[float]) -> None:
        """Add one log interval; if there are too many columns, merge each with its neighbor."""
        self._columns.append((iteration, experts_by_layer))
        if len(self._columns) >= 2 * MAX_COLUMNS:
            pairs = zip(self._columns[::2], self._columns[1::2], strict=True)
            self._columns = [
                (last, [(a + b) / 2 for a, b in zip(first_row, last_row, strict=True)])
                for (_, first_row), (last, last_row) in pairs
            ]

    def draw(self) -> Any | None:
        """The heat map, a matplotlib figure; None if there is nothing to draw."""
        if not self._columns:
            return None
        from matplotlib.figure import Figure

        iterations = [iteration for iteration, _ in self._columns]
        rows = zip(*(row for _, row in self._columns), strict=True)
        values = {
            number: row for number, row in enumerate(rows, 1) if not all(map(math.isnan, row))
        }
        if not values:
            return None
        figure = Figure(figsize=(7, 4), layout="constrained")
        draw_layers(figure.subplots(), iterations, values)
        return figure


def knob_of(dynmoe: DynMoEConfig) -> str | None:
    """What the routing calls its number that can be moved: of top-p, ``threshold``."""
    return RULES[dynmoe.routing].knob
