"""The settings of dynamic routing: one dataclass defines the flags, the YAML keys and the docs.

Every field is ``--moe-dynamic-<name>`` on the command line (:mod:`.arguments`) and ``<name>`` in
the YAML file that ``DYNMOE_CONFIG`` names. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

from megatron_dynmoe.settings.checks import check_settings
from megatron_dynmoe.settings.distribution import Target, TargetDistribution
from megatron_dynmoe.settings.messages.refusals import SettingError, UnknownSettingError
from megatron_dynmoe.settings.routings import (
    ROUTINGS,
    STOCK,
    Derived,
    RoutingSettings,
    routings_with,
)
from megatron_dynmoe.settings.setting import Setting, coerce, described

BACKENDS = ("auto", "torch_native", "local", "transformer_engine")
BALANCE_LOSSES = ("seq_aux_loss", "aux_loss", "global_aux_loss", "none")
ROW_BUFFERS = ("measured", "worst_case", "target")
CONTROLLED_QUANTITIES = ("experts", "busiest_rank")
NULL_KINDS = ("zero", "identity")
CONTROL_LAWS = ("pi", "sign")


class LossCoefficients(NamedTuple):
    """Coefficients on the scale of the main loss; see :attr:`DynMoEConfig.loss_coefficients`."""

    dynamic: float
    balance: float


class Control(NamedTuple):
    """The controller's settings, all of them set; see :attr:`DynMoEConfig.control`."""

    target: Target
    proportional_gain: float | str  # this and the next two: a number, or auto until computed
    integral_gain: float | str
    initial_threshold: float | str
    min_threshold: float
    max_threshold: float


@dataclass(frozen=True)
class DynMoEConfig:
    """Settings of dynamic routing. ``None`` means the default of the routing; see :meth:`resolve`.

    Units: thresholds are cumulative probabilities, targets and caps are experts per token, and loss
    coefficients are on the scale of the language-model loss.
    """

    routing: Annotated[
        str,
        Setting(
            "choice",
            "How experts are chosen: "
            + ", ".join(f"{name} ({kind.summary})" for name, kind in ROUTINGS.items())
            + ".",
            tuple(ROUTINGS),
        ),
    ] = STOCK
    threshold: Annotated[
        float | None,
        Setting(
            "float",
            "The cumulative probability that the selected experts must exceed.",
        ),
    ] = None
    target_experts_per_token: Annotated[
        Target | None,
        Setting(
            "schedule",
            "The mean number of experts per token to hold, over all tokens and MoE layers. "
            "A number; a schedule ITERATION:TARGET,... (linear in between), such as 0:8,1000:2; or "
            "uniform(LOW,HIGH): drawn anew for every global batch, for one model that serves at "
            "every budget of the range.",
        ),
    ] = None
    max_experts_per_token: Annotated[
        int | None,
        Setting("int", "No token uses more experts than this. No cap unless it is given."),
    ] = None
    null_slots: Annotated[
        int | None,
        Setting(
            "int",
            "Null slots beside the experts of a layer. They have one logit in common, and share a "
            "token's probability as if there were so many.",
        ),
    ] = None
    null_kind: Annotated[
        str | None,
        Setting(
            "choice",
            "What a null slot puts out: nothing (zero), or the token itself, by its weight "
            "(identity).",
            NULL_KINDS,
        ),
    ] = None
    controlled_quantity: Annotated[
        str | None,
        Setting(
            "choice",
            "What is held at the target: experts (the mean number of experts per token), or "
            "busiest_rank (this mean times the rows of the busiest expert-parallel rank over those "
            "of the mean rank: what a step waits for). The second needs the alltoall dispatcher if "
            "there are several such ranks; with one, both are the same.",
            CONTROLLED_QUANTITIES,
        ),
    ] = None
    control_law: Annotated[
        str | None,
        Setting(
            "choice",
            "How the error moves the knob: pi (the PI law), or sign (ReMoE's law: each step "
            "multiplies lambda by 10 to the power of the integral gain, or divides by it).",
            CONTROL_LAWS,
        ),
    ] = None
    scope: Annotated[
        str | None,
        Setting(
            "choice",
            "One threshold for the model (global) or one per layer (layer).",
            ("global", "layer"),
        ),
    ] = None
    proportional_gain: Annotated[
        float | str | None,
        Setting(
            "float_or_auto",
            "K_p of the PI controller, or auto: computed from the number of experts and the "
            "target.",
        ),
    ] = None
    integral_gain: Annotated[
        float | str | None,
        Setting("float_or_auto", "K_i of the PI controller, or auto."),
    ] = None
    initial_threshold: Annotated[
        float | str | None,
        Setting(
            "float_or_auto",
            "The threshold of the first step, or auto: computed from the number of experts, the "
            "target and the logits' distribution at initialization. Of relu, log10 of lambda.",
        ),
    ] = None
    min_threshold: Annotated[
        float | None,
        Setting("float", "The controller never goes below this."),
    ] = None
    max_threshold: Annotated[
        float | None,
        Setting("float", "The controller never goes above this."),
    ] = None
    threshold_decay: Annotated[
        float | None,
        Setting(
            "float",
            "Each expert's threshold is a moving average over global batches; a batch counts this "
            "much less with each one after it. The first batches count more: n batches after the "
            "start, the last one has at least the weight 100 / (100 + n).",
        ),
    ] = None
    normalization: Annotated[
        str | None,
        Setting(
            "choice",
            "Dynamic routing normalization of the logits, with a learnable scale per layer: drn "
            "or none.",
            ("drn", "none"),
        ),
    ] = None
    weights: Annotated[
        str | None,
        Setting(
            "choice",
            "Weights of the selected experts: raw probabilities, or renormalized over the "
            "selected ones.",
            ("raw", "renormalized"),
        ),
    ] = None
    dynamic_loss_coeff: Annotated[
        float | None,
        Setting(
            "float",
            "Coefficient of the dynamic loss, the mean entropy of the router.",
        ),
    ] = None
    balance_loss: Annotated[
        str | None,
        Setting(
            "choice",
            "Scope of the load-balance loss: seq_aux_loss (each sequence), aux_loss "
            "(micro-batch), global_aux_loss (global batch) or none. The names are those of "
            "upstream's --moe-router-load-balancing-type, which may be given instead.",
            BALANCE_LOSSES,
        ),
    ] = None
    balance_loss_coeff: Annotated[
        float | None,
        Setting(
            "float",
            "Coefficient of the load-balance loss; upstream's --moe-aux-loss-coeff may be given "
            "instead.",
        ),
    ] = None
    row_buffer: Annotated[
        str | None,
        Setting(
            "choice",
            "Room for the rows that a layer dispatches (a row is one token at one expert). "
            "measured: as many as were routed; the host waits for their number. "
            "worst_case: as many as max_experts_per_token allows; this takes more memory, but the "
            "host never waits. target: as many as the layer had in the step before and a margin; "
            "the host waits once a step, and a step that needs more is run again. The last two "
            "need one expert-parallel rank and torch_native's grouped GEMMs.",
            ROW_BUFFERS,
        ),
    ] = None
    row_buffer_margin: Annotated[
        float | None,
        Setting(
            "float",
            "With row_buffer target: the room beyond the rows of the step before, as a share of "
            "them.",
        ),
    ] = None
    backend: Annotated[
        str | None,
        Setting(
            "choice",
            "The code that runs attention, norms and experts, also with top_k: torch_native "
            "(PyTorch's fused calls), local (Megatron's own, without Transformer Engine), "
            "transformer_engine, or auto: transformer_engine if it is installed, else "
            "torch_native.",
            BACKENDS,
        ),
    ] = None
    inference_threshold: Annotated[
        float | None,
        Setting("float", "Threshold in evaluation and inference. Default: the trained one."),
    ] = None
    inference_max_experts_per_token: Annotated[
        int | None,
        Setting("int", "Cap in evaluation and inference. Default: max_experts_per_token."),
    ] = None
    check_ranks: Annotated[
        int | None,
        Setting(
            "int",
            "For debugging: after every so many steps, compare threshold, integral, theta, gate "
            "and the rule's state of all routers between ranks, bit for bit, and stop if two "
            "differ. Default: never.",
        ),
    ] = None

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            value = getattr(self, name)
            if value is not None or name == "routing":
                object.__setattr__(self, name, coerce(name, setting, value))

    @property
    def is_dynamic(self) -> bool:
        """Whether tokens choose how many experts they use."""
        return self.routing != STOCK

    @property
    def is_controlled(self) -> bool:
        """Whether the PI controller steers the threshold."""
        return ROUTINGS[self.routing].is_controlled

    @property
    def drawn_target(self) -> TargetDistribution | None:
        """The distribution that the target is drawn from; None if it is not drawn."""
        target = self.target_experts_per_token
        return target if isinstance(target, TargetDistribution) else None

    def seeded(self, seed: int) -> DynMoEConfig:
        """The same settings, with a run's seed for the target if it is drawn."""
        if self.drawn_target is None:
            return self
        return dataclasses.replace(self, target_experts_per_token=self.drawn_target.seeded(seed))

    @property
    def loss_coefficients(self) -> LossCoefficients:
        """The coefficients of both losses; the settings must be resolved, with dynamic routing."""
        return LossCoefficients(self.dynamic_loss_coeff or 0.0, self.balance_loss_coeff or 0.0)

    @property
    def control(self) -> Control:
        """The controller's settings; these settings must be resolved, with ``dtop_p``."""
        target, low, high = self.target_experts_per_token, self.min_threshold, self.max_threshold
        proportional, integral = self.proportional_gain, self.integral_gain
        first = self.initial_threshold
        assert target is not None and low is not None and high is not None
        assert proportional is not None and integral is not None and first is not None
        return Control(target, proportional, integral, first, low, high)

    @classmethod
    def from_dict(cls, settings: dict[str, Any], source: str) -> DynMoEConfig:
        """Build from names and values; ``source`` names their origin in errors.

        Raises:
            ValueError: a name is unknown, or a value is of the wrong kind.
        """
        for name in settings:
            if name not in SETTINGS:
                raise UnknownSettingError(name, source, SETTINGS)
        return cls(**settings)

    @classmethod
    def from_yaml(cls, path: str | Path) -> DynMoEConfig:
        """Read a YAML file of ``name: value`` lines.

        Raises:
            ValueError: the file is missing, is not such a mapping, or has a bad setting in it.
        """
        import yaml

        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())  # YAML's has many lines
            raise ValueError(f"DYNMOE_CONFIG is {str(path)!r}: cannot read it ({why}).") from None
        if not isinstance(settings, dict):
            raise ValueError(
                f"DYNMOE_CONFIG is {str(path)!r}: it must hold 'name: value' lines, such as "
                "'routing: dtop_p'."
            )
        return cls.from_dict(settings, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return names and values that :meth:`from_dict` reads back, without unset ones."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        if self.target_experts_per_token is not None:
            settings["target_experts_per_token"] = str(self.target_experts_per_token)
        return {name: value for name, value in settings.items() if value is not None}

    def resolve(self, num_experts: int | None) -> DynMoEConfig:
        """Fill every default of the chosen routing and check all settings against each other.

        ``auto`` values stay as they are; :func:`megatron_dynmoe.control.settle.settle` computes
        them later.

        Raises:
            SettingError: a setting is wrong by itself, contradicts another, or does not fit
                ``num_experts``.
        """
        kind = ROUTINGS[self.routing]
        self._refuse_foreign(kind)
        if not self.is_dynamic:
            return self
        if not num_experts:  # Megatron reads --num-experts 0 as a model without experts
            raise SettingError(
                "routing", self.routing, ", but the model has no experts", "set --num-experts"
            )
        defaults = kind.defaults_of(self)
        if (self.balance_loss or defaults["balance_loss"]) == "none":
            if self.balance_loss_coeff:
                raise SettingError(
                    "balance_loss_coeff",
                    self.balance_loss_coeff,
                    " and {balance_loss} is 'none'",
                    "leave the coefficient out, or choose a loss, such as seq_aux_loss",
                )
            defaults["balance_loss_coeff"] = 0.0
        if self.row_buffer != "target":
            if self.row_buffer_margin is not None:
                raise SettingError(
                    "row_buffer_margin",
                    self.row_buffer_margin,
                    f" and {{row_buffer}} is {self.row_buffer or 'measured'!r}",
                    "set {row_buffer} to 'target', or leave the margin out",
                )
            defaults.pop("row_buffer_margin", None)
        for name, value in defaults.items():
            if isinstance(value, Derived):
                defaults[name] = value.value(self, num_experts)
        if "inference_max_experts_per_token" in kind.takes:
            cap = self.max_experts_per_token or defaults.get("max_experts_per_token")
            defaults["inference_max_experts_per_token"] = cap
        resolved = dataclasses.replace(
            self, **{name: value for name, value in defaults.items() if getattr(self, name) is None}
        )
        check_settings(resolved, self, num_experts)
        return resolved

    def _refuse_foreign(self, kind: RoutingSettings) -> None:
        """Refuse settings that the routing does not have."""
        for name in SETTINGS:
            value = getattr(self, name)
            if value is None or name == "routing" or name in kind.takes:
                continue
            others = " or ".join(repr(other) for other in routings_with(name))
            if not self.is_dynamic:  # of all mistakes here, the likeliest is to forget the routing
                raise SettingError(
                    "routing",
                    self.routing,
                    f", which has no {{{name}}}",
                    f"set {{routing}} to {others}, or leave {{{name}}} out",
                )
            remedy = f"set {{routing}} to {others}"
            raise SettingError(
                name,
                value,
                f", which {{routing}} {self.routing!r} does not have",
                f"use {{{kind.instead[name]}}}, or {remedy}"
                if name in kind.instead
                else f"{remedy}, or leave it out",
            )


# Kind, help and choices of every field by its name, in order.
SETTINGS: dict[str, Setting] = {
    name: described(name, hint.__metadata__[0])
    for name, hint in get_type_hints(DynMoEConfig, include_extras=True).items()
}
