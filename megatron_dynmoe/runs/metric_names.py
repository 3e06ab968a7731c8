"""The names under which a run logs its values, in TensorBoard, in W&B and on the console.

What writes, draws or reads a run takes its names from here. docs/monitoring.md lists the names of
:data:`MEANINGS`.
"""

from __future__ import annotations

import re
from typing import Any

# Megatron's own
LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"
GRADIENT_NORM = "grad-norm"
LEARNING_RATE = "learning-rate"
BATCH_SIZE = "batch-size"

# Ours
EXPERTS = "dynmoe/experts_per_token"
STD_EXPERTS = "dynmoe/std_experts_per_token"
VALIDATION_EXPERTS = "dynmoe/validation_experts_per_token"
VALIDATION_STD_EXPERTS = "dynmoe/validation_std_experts_per_token"
TARGET = "dynmoe/target_experts_per_token"
THRESHOLD = "dynmoe/threshold"
SHARE_AT_CAP = "dynmoe/share_of_tokens_at_cap"
SHARE_NOT_FINITE = "dynmoe/share_of_tokens_not_finite"
BALANCE_LOSS = "dynmoe/balance_loss"
DYNAMIC_LOSS = "dynmoe/dynamic_loss"
MAX_OVER_MEAN_LOAD = "dynmoe/max_over_mean_load"
MEDIAN_LOAD = "dynmoe/max_over_mean_load_median"
HIGH_LOAD = "dynmoe/max_over_mean_load_95th_percentile"
MAX_VIOLATION = "dynmoe/max_violation"
BUSIEST_RANK = "dynmoe/busiest_rank_experts_per_token"
BUSIEST_RANK_ROWS = "dynmoe/busiest_rank_rows"
SHARE_WAITING = "dynmoe/share_of_step_waiting"
TOKENS_PER_SECOND = "dynmoe/tokens_per_second"
TFLOPS_PER_SECOND = "dynmoe/tflops_per_second"
HEAT_MAP = "dynmoe/experts_per_token_by_layer"  # an image
# Quantities with a value per layer; see of_layer
EXPERTS_OF_LAYER = "experts_per_token"
THRESHOLD_OF_LAYER = "threshold"
THETA_OF_LAYER = "theta"


def of_layer(quantity: str, layer: Any) -> str:
    """The name of a quantity in one layer, which is numbered from 1."""
    return f"dynmoe_layers/{quantity}_layer_{layer}"


def of_any_layer(quantity: str) -> re.Pattern[str]:
    """A pattern for a quantity's names in all layers; its group is the layer's number."""
    return re.compile(of_layer(quantity, r"(\d+)"))


MEANINGS = {
    EXPERTS: "mean experts per token over the tokens and MoE layers of the step",
    STD_EXPERTS: "their standard deviation over tokens and layers",
    TARGET: "the target at that step",
    THRESHOLD: "the threshold during the step, the mean over layers; of other rules, the number "
    "that the controller moves",
    SHARE_AT_CAP: "share of tokens that use as many experts as the cap allows",
    MAX_OVER_MEAN_LOAD: "tokens of a layer's busiest expert over its mean, in the worst layer",
    MEDIAN_LOAD: "the same in the median layer",
    HIGH_LOAD: "the same at the 95th percentile of the layers",
    MAX_VIOLATION: "MaxVio of the global batch: the same, less 1, in the mean over the layers",
    BUSIEST_RANK: "experts per token times the rows of the busiest expert-parallel rank over the "
    "mean rank's: what `busiest_rank` holds",
    BUSIEST_RANK_ROWS: "rows of the busiest rank in a dispatch of one layer, the mean",
    SHARE_WAITING: "the share of a step in which the mean rank waits for the busiest one, by FLOPs",
    BALANCE_LOSS: "the balance loss without its coefficient",
    DYNAMIC_LOSS: "the dynamic loss (the mean entropy of the router, nats) without its coefficient",
    SHARE_NOT_FINITE: "share of tokens with a NaN or infinite logit, if there are any",
    VALIDATION_EXPERTS: "mean experts per token of an evaluation",
    VALIDATION_STD_EXPERTS: "their standard deviation",
    TOKENS_PER_SECOND: "tokens per second of all ranks, over a log interval",
    TFLOPS_PER_SECOND: "TFLOP/s of all ranks from the measured experts, over a log interval",
    of_layer(EXPERTS_OF_LAYER, "N"): "mean experts per token of layer N",
    of_layer(THETA_OF_LAYER, "N"): "the scale of the normalized logits of layer N",
    of_layer(THRESHOLD_OF_LAYER, "N"): "the same of layer N, with scope `layer`",
    HEAT_MAP: "an image: experts per token by layer and step",
}
