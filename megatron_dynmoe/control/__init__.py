"""The controller holds the mean number of experts per token at its target by moving a rule's knob.

The counts of one global batch enter, and the knob of the next batch leaves.

``pi`` is the control law, ``pi_map`` that of a target which is drawn for each batch. ``calibrate``
computes their starting points and gains. All three are pure tensor math. ``update`` reduces counts
over ranks and chooses the moment within a training step.
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
from megatron_dynmoe.control.pi_map import MapController

__all__ = [
    "MapController",
    "PIController",
    "default_gains",
    "gain_margin",
    "initial_threshold",
    "mean_experts_per_token",
    "plant_slope",
    "threshold_for_target",
]
