"""Holding the mean number of experts per token at its target by moving a rule's knob.

The counts of a global batch enter, the knob of the next one leaves.

``pi`` is the law, ``calibrate`` its starting point and gains. Both are pure tensor maths: the
reduction over ranks and the timing within a training step are kept apart from them.
"""

from megatron_dynmoe.control.calibrate import (
    default_gains,
    gain_margin,
    initial_threshold,
    mean_experts_per_token,
    plant_slope,
    threshold_for_target,
)
from megatron_dynmoe.control.pi import PIController

__all__ = [
    "PIController",
    "default_gains",
    "gain_margin",
    "initial_threshold",
    "mean_experts_per_token",
    "plant_slope",
    "threshold_for_target",
]
