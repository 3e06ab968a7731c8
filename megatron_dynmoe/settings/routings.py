"""What each ``--moe-dynamic-routing`` takes: one row of :data:`ROUTINGS` per routing.

Refusals, defaults, help texts and docs/configuration.md follow from a row. The rule that computes
the routing is a file in ``moe/rules/``. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from megatron_dynmoe.settings.config import DynMoEConfig

AUTO = "auto"
STOCK = "top_k"

# Settings that any rule can take, because the router or the layer computes what they ask for.
COMMON = (
    *("normalization", "dynamic_loss_coeff", "balance_loss", "balance_loss_coeff"),
    *("row_buffer", "backend", "check_ranks"),
)
# Settings that a rule can take if it reads them.
WEIGHTS = ("weights",)
CAPS = ("max_experts_per_token", "inference_max_experts_per_token")
# The settings of a rule that holds a mean number of experts, with a controller or by construction.
TARGET = ("target_experts_per_token", "row_buffer_margin")
# The settings of a controller.
CONTROLLER = (
    *TARGET,
    *("controlled_quantity", "scope", "proportional_gain", "integral_gain"),
    *("initial_threshold", "min_threshold", "max_threshold"),
)


class Derived(NamedTuple):
    """A default that follows from other settings and the number of experts."""

    words: str  # for helps and docs
    value: Callable[[DynMoEConfig, int], Any]

    def __str__(self) -> str:
        return self.words


# What is computed from normal logits unless it is given.
CALIBRATED = ("initial_threshold", "proportional_gain", "integral_gain")


@dataclass(frozen=True)
class RoutingSettings:
    """The settings of one routing.

    Attributes:
        title: its name in prose.
        summary: what it is, for the help of ``--moe-dynamic-routing``.
        takes: the settings that it has; every other one is refused.
        defaults: the values of settings that are left out, or how they follow from others. Other
            settings stay None.
        law_defaults: by ``control_law``, defaults that replace these.
        required: settings without a default that have to be given, each with the remedy.
        instead: settings of other routings, each with the one that this routing has for it.
        refuses: settings of upstream that do not go with it, each with the reason.
        least_experts: the fewest experts of a token: 0 if one may be left without any.
        draws_target: whether the target may be a distribution: the knob alone sets the count.
        balance_holds_count: whether the gradient of the balance loss is what holds the count.
        is_exported: whether formats can hold models with it.
        errors: what the controller's law takes for the error of a batch (``control/pi.py``).
        knob_range: the least and the largest value of the knob, and so of ``threshold``,
            ``initial_threshold``, ``inference_threshold`` and the controller's bounds.
        knob_remedy: what the error says of a value outside of this range.
    """

    title: str
    summary: str
    takes: tuple[str, ...]
    defaults: Mapping[str, Any]
    law_defaults: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    required: Mapping[str, str] = dataclasses.field(default_factory=dict)
    instead: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)
    least_experts: int = 1
    draws_target: bool = False
    balance_holds_count: bool = False
    is_exported: bool = False
    errors: str = "share"
    knob_range: tuple[float, float] = (0.0, 1.0)
    knob_remedy: str = "it is a cumulative probability, so use 0 (one expert) to 1 (all experts)"

    @property
    def is_controlled(self) -> bool:
        """Whether a PI controller moves the knob."""
        return set(CONTROLLER) <= set(self.takes)

    @property
    def is_calibrated(self) -> bool:
        """Whether gains and the first knob are computed from normal logits unless they are given.

        Else the defaults of the routing are numbers.
        """
        return AUTO in (self.defaults.get(name) for name in CALIBRATED)

    def defaults_of(self, dynmoe: DynMoEConfig) -> dict[str, Any]:
        """The defaults with the control law of these settings."""
        return {**self.defaults, **self.law_defaults.get(dynmoe.control_law or "", {})}


_NOISE = "half of all gates of random logits are open, whatever the coefficient of the L1 loss is"


def _twice_the_target(dynmoe: DynMoEConfig, num_experts: int) -> int:
    target = dynmoe.target_experts_per_token
    return num_experts if target is None else math.ceil(min(num_experts, 2 * max(target.targets)))


_COMMON_DEFAULTS = {"balance_loss": "seq_aux_loss", "row_buffer": "measured", "backend": AUTO}
_SHARE_REMEDY = "it is the share of all tokens that an expert takes, so use 0 to 1"
_TARGET_REQUIRED = {
    "target_experts_per_token": "give the mean number of experts per token to hold, such as 2"
}
_CONTROLLER_DEFAULTS = {
    "controlled_quantity": "experts",
    "scope": "global",
    "proportional_gain": AUTO,
    "integral_gain": AUTO,
    "initial_threshold": AUTO,
    "min_threshold": 0.0,
    "max_threshold": 1.0,
    "row_buffer_margin": 0.1,
}

ROUTINGS: dict[str, RoutingSettings] = {
    STOCK: RoutingSettings(
        title="top-k",
        summary="stock Megatron, the default",
        takes=("backend",),
        defaults={},
        is_exported=True,
    ),
    # "Harder Task Needs More Experts": p = 0.4, equation 4, alpha = 1e-2 and beta = 1e-4.
    "top_p": RoutingSettings(
        title="top-p",
        summary="Dynamic MoE: a fixed threshold",
        takes=(*COMMON, *WEIGHTS, *CAPS, "threshold", "inference_threshold"),
        defaults=_COMMON_DEFAULTS
        | {
            "threshold": 0.4,
            "normalization": "none",
            "weights": "raw",
            "balance_loss_coeff": 1e-2,
            "dynamic_loss_coeff": 1e-4,
        },
        is_exported=True,
    ),
    # DTop-p: renormalized weights, balance 1e-4, dynamic 1e-3.
    "dtop_p": RoutingSettings(
        title="DTop-p",
        summary="DTop-p: a PI controller steers the threshold to the target",
        takes=(*COMMON, *WEIGHTS, *CAPS, *CONTROLLER, "inference_threshold"),
        defaults=_COMMON_DEFAULTS
        | _CONTROLLER_DEFAULTS
        | {
            "normalization": "drn",
            "weights": "renormalized",
            "balance_loss_coeff": 1e-4,
            "dynamic_loss_coeff": 1e-3,
        },
        required=_TARGET_REQUIRED,
        instead={"threshold": "initial_threshold"},
        draws_target=True,
        is_exported=True,
    ),
    # Expert Threshold Routing (arXiv 2603.11535): sigmoids of the logits as weights, no loss.
    "expert_threshold": RoutingSettings(
        title="expert threshold",
        summary="each expert takes the tokens above its own threshold, a moving average of the "
        "quantile of its scores; a PI controller steers the quantile to the target",
        takes=(*COMMON, *WEIGHTS, *CAPS, *CONTROLLER, "threshold_decay"),
        defaults=_COMMON_DEFAULTS
        | _CONTROLLER_DEFAULTS
        | {
            "threshold_decay": 0.99,
            "normalization": "none",
            "weights": "raw",
            "balance_loss": "none",
            "balance_loss_coeff": 1e-2,
            "dynamic_loss_coeff": 0.0,
        },
        required=_TARGET_REQUIRED,
        least_experts=0,
        is_exported=True,
        knob_remedy=_SHARE_REMEDY,
    ),
    # "Composing Weight and Data Sparsity": zero slots, half of the slots null on average, weights
    # renormalized. The coefficient is that of the other rules (docs/rules.md has the paper's).
    "null_experts": RoutingSettings(
        title="null experts",
        summary="top-k of experts and null slots; a PI controller steers the share of tokens that "
        "an expert takes, from which the null slots' bias follows",
        takes=(*COMMON, *WEIGHTS, *CAPS, *CONTROLLER, "null_slots", "null_kind"),
        defaults=_COMMON_DEFAULTS
        | _CONTROLLER_DEFAULTS
        | {
            # As the papers' losses and biases, which are of one layer each. With one bias for all,
            # the layers' null logits decide what each uses, and nothing teaches them that.
            "scope": "layer",
            "max_experts_per_token": Derived("twice the largest target", _twice_the_target),
            "null_slots": Derived("one per expert", lambda _, num_experts: num_experts),
            "null_kind": "zero",
            "normalization": "none",
            "weights": "renormalized",
            "balance_loss": "global_aux_loss",
            "balance_loss_coeff": 1e-2,
            "dynamic_loss_coeff": 0.0,
        },
        required=_TARGET_REQUIRED,
        least_experts=0,
        is_exported=True,
        knob_remedy=_SHARE_REMEDY,
    ),
    # SeqTopK: weights as those of Megatron's top-k, and no loss of its own beside the balance loss.
    "seq_top_k": RoutingSettings(
        title="SeqTopK",
        summary="SeqTopK: the tokens of a sequence share a number of experts",
        takes=(*COMMON, *WEIGHTS, *CAPS, *TARGET),
        defaults=_COMMON_DEFAULTS
        | {
            "normalization": "none",
            "weights": "renormalized",
            "balance_loss_coeff": 1e-2,
            "dynamic_loss_coeff": 0.0,
            "row_buffer_margin": 0.0,
        },
        required=_TARGET_REQUIRED,
        least_experts=0,
        is_exported=True,
    ),
    # ReMoE: lambda starts at 1e-8 and moves by 1.2 a step, f_i over micro-batches (its code).
    "relu": RoutingSettings(
        title="ReLU",
        summary="ReMoE: the experts with a positive gate; an L1 loss is steered to the target",
        takes=(
            *("balance_loss", "row_buffer", "backend", "check_ranks"),
            *CAPS,
            *CONTROLLER,
            "control_law",
        ),
        defaults=_COMMON_DEFAULTS
        | _CONTROLLER_DEFAULTS
        | {
            "balance_loss": "aux_loss",
            "control_law": "pi",
            "proportional_gain": 0.5,
            "integral_gain": 0.08,
            "initial_threshold": -8.0,
            "min_threshold": -16.0,
            "max_threshold": 2.0,
        },
        law_defaults={"sign": {"proportional_gain": 0.0, "integral_gain": math.log10(1.2)}},
        required=_TARGET_REQUIRED,
        refuses={
            "moe_z_loss_coeff": "it pulls all gates below zero, which is for the L1 loss to steer",
            "moe_router_force_load_balancing": _NOISE,
            "moe_router_force_biased": _NOISE,
        },
        least_experts=0,
        balance_holds_count=True,
        is_exported=True,
        errors="relative",
        knob_range=(-30.0, 10.0),
        knob_remedy="it is log10 of the L1 loss's coefficient, so use -30 to 10, such as -8",
    ),
}
DYNAMIC = {name: kind for name, kind in ROUTINGS.items() if name != STOCK}


def routings_with(setting: str) -> list[str]:
    """The names of the routings that take a setting."""
    return [name for name, kind in ROUTINGS.items() if setting in kind.takes]
