"""The settings of dynamic routing: one dataclass defines the flags, the YAML keys and the docs.

Every field is ``--moe-dynamic-<name>`` on the command line (:mod:`.arguments`) and ``<name>`` in
the YAML file that ``DYNMOE_CONFIG`` names. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

from megatron_dynmoe.settings.refusals import SettingError, UnknownSettingError
from megatron_dynmoe.settings.schedule import TargetSchedule

ROUTINGS = ("top_k", "top_p", "dtop_p")
BACKENDS = ("auto", "torch_native", "local", "transformer_engine")
BALANCE_LOSSES = ("seq_aux_loss", "aux_loss", "global_aux_loss", "none")
ROW_BUFFERS = ("measured", "worst_case")
AUTO = "auto"


class Setting(NamedTuple):
    """The kind of a field's value, its help text and its choices; see :data:`SETTINGS`."""

    kind: str
    help: str
    choices: tuple[str, ...] = ()


class LossCoefficients(NamedTuple):
    """Coefficients on the scale of the main loss; see :attr:`DynMoEConfig.loss_coefficients`."""

    dynamic: float
    balance: float


class Control(NamedTuple):
    """The controller's settings, all of them set; see :attr:`DynMoEConfig.control`."""

    target: TargetSchedule
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
            "How experts are chosen: top_k (stock Megatron, the default), top_p (Dynamic MoE: a "
            "fixed threshold) or dtop_p (DTop-p: a PI controller steers the threshold to the "
            "target).",
            ROUTINGS,
        ),
    ] = "top_k"
    threshold: Annotated[
        float | None,
        Setting(
            "float",
            "top_p: the cumulative probability that the selected experts must exceed. Default 0.4.",
        ),
    ] = None
    target_experts_per_token: Annotated[
        TargetSchedule | None,
        Setting(
            "schedule",
            "dtop_p: the mean number of experts per token to hold, over all tokens and MoE layers. "
            "A number, or a schedule ITERATION:TARGET,... (linear in between), such as 0:8,1000:2.",
        ),
    ] = None
    max_experts_per_token: Annotated[
        int | None,
        Setting("int", "No token uses more experts than this. Default: no cap."),
    ] = None
    scope: Annotated[
        str | None,
        Setting(
            "choice",
            "dtop_p: one threshold for the model (global, the default) or one per layer (layer).",
            ("global", "layer"),
        ),
    ] = None
    proportional_gain: Annotated[
        float | str | None,
        Setting(
            "float_or_auto",
            "dtop_p: K_p of the PI controller, or auto (the default): computed from the number of "
            "experts and the target.",
        ),
    ] = None
    integral_gain: Annotated[
        float | str | None,
        Setting("float_or_auto", "dtop_p: K_i of the PI controller, or auto (the default)."),
    ] = None
    initial_threshold: Annotated[
        float | str | None,
        Setting(
            "float_or_auto",
            "dtop_p: the threshold of the first step, or auto (the default): computed from the "
            "number of experts, the target and the logits' distribution at initialization.",
        ),
    ] = None
    min_threshold: Annotated[
        float | None,
        Setting("float", "dtop_p: the controller never goes below this. Default 0."),
    ] = None
    max_threshold: Annotated[
        float | None,
        Setting("float", "dtop_p: the controller never goes above this. Default 1."),
    ] = None
    normalization: Annotated[
        str | None,
        Setting(
            "choice",
            "Dynamic routing normalization of the logits, with a learnable scale per layer: drn "
            "(default of dtop_p) or none (default of top_p).",
            ("drn", "none"),
        ),
    ] = None
    weights: Annotated[
        str | None,
        Setting(
            "choice",
            "Weights of the selected experts: raw probabilities (default of top_p) or "
            "renormalized over the selected ones (default of dtop_p).",
            ("raw", "renormalized"),
        ),
    ] = None
    dynamic_loss_coeff: Annotated[
        float | None,
        Setting(
            "float",
            "Coefficient of the dynamic loss, the mean entropy of the router. Default 1e-4 for "
            "top_p, 1e-3 for dtop_p.",
        ),
    ] = None
    balance_loss: Annotated[
        str | None,
        Setting(
            "choice",
            "Scope of the load-balance loss: seq_aux_loss (each sequence, the default), aux_loss "
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
            "instead. Default 1e-2 for top_p, 1e-4 for dtop_p.",
        ),
    ] = None
    row_buffer: Annotated[
        str | None,
        Setting(
            "choice",
            "Room for the rows that a layer dispatches (a row is one token at one expert). "
            "measured (the default): as many as were routed; the host waits for their number. "
            "worst_case: as many as max_experts_per_token allows; this takes more memory, but the "
            "host never waits. It needs one expert-parallel rank and torch_native's grouped GEMMs.",
            ROW_BUFFERS,
        ),
    ] = None
    backend: Annotated[
        str | None,
        Setting(
            "choice",
            "The code that runs attention, norms and experts, also with top_k: torch_native "
            "(PyTorch's fused calls), local (Megatron's own, without Transformer Engine), "
            "transformer_engine, or auto (the default): transformer_engine if it is installed, "
            "else torch_native.",
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
            "For debugging: after every so many steps, compare threshold, integral, theta and gate "
            "of all routers between ranks, bit for bit, and stop if two differ. Default: never.",
        ),
    ] = None

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            value = getattr(self, name)
            if value is not None or name == "routing":
                object.__setattr__(self, name, _coerce(name, setting, value))

    @property
    def is_dynamic(self) -> bool:
        """Whether tokens choose how many experts they use."""
        return self.routing != "top_k"

    @property
    def is_controlled(self) -> bool:
        """Whether the PI controller steers the threshold."""
        return "integral_gain" in _DEFAULTS.get(self.routing, {})

    @property
    def loss_coefficients(self) -> LossCoefficients:
        """The coefficients of both losses; the settings must be resolved, with dynamic routing."""
        dynamic, balance = self.dynamic_loss_coeff, self.balance_loss_coeff
        assert dynamic is not None and balance is not None
        return LossCoefficients(dynamic, balance)

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
        if not self.is_dynamic:
            given = [name for name in self.to_dict() if name not in ("routing", "backend")]
            if given:
                raise SettingError(
                    "routing",
                    "top_k",
                    f", which has no {{{given[0]}}}",
                    f"set {{routing}} to 'top_p' or 'dtop_p', or leave {{{given[0]}}} out",
                )
            return self
        if not num_experts:  # Megatron reads --num-experts 0 as a model without experts
            raise SettingError(
                "routing", self.routing, ", but the model has no experts", "set --num-experts"
            )
        defaults = dict(_DEFAULTS[self.routing])
        foreign = _ONLY_DTOP_P if self.routing == "top_p" else ("threshold",)
        for name in foreign:
            if getattr(self, name) is not None:
                remedy = (
                    "set {routing} to 'dtop_p', or leave it out"
                    if self.routing == "top_p"
                    else "use {initial_threshold}, or set {routing} to 'top_p'"
                )
                raise SettingError(
                    name,
                    getattr(self, name),
                    f", which {{routing}} {self.routing!r} does not have",
                    remedy,
                )
        if self.balance_loss == "none":
            if self.balance_loss_coeff:
                raise SettingError(
                    "balance_loss_coeff",
                    self.balance_loss_coeff,
                    " and {balance_loss} is 'none'",
                    "leave the coefficient out, or choose a loss, such as seq_aux_loss",
                )
            defaults["balance_loss_coeff"] = 0.0
        if self.inference_max_experts_per_token is None:
            defaults["inference_max_experts_per_token"] = self.max_experts_per_token
        resolved = dataclasses.replace(
            self, **{name: value for name, value in defaults.items() if getattr(self, name) is None}
        )
        resolved._check(num_experts)
        return resolved

    def _check(self, num_experts: int) -> None:
        for name in ("max_experts_per_token", "inference_max_experts_per_token"):
            cap = getattr(self, name)
            if cap is not None and not 1 <= cap <= num_experts:
                raise SettingError(
                    name,
                    cap,
                    "",
                    f"use 1 to {num_experts} (the number of experts), or leave it out for no cap",
                )
        if self.row_buffer == "worst_case" and self.max_experts_per_token is None:
            raise SettingError(
                "row_buffer",
                "worst_case",
                " and {max_experts_per_token} is not set, so the worst case is all "
                f"{num_experts} experts for every token",
                "set {max_experts_per_token}, or leave {row_buffer} out",
            )
        if self.check_ranks is not None and self.check_ranks < 1:
            raise SettingError(
                "check_ranks",
                self.check_ranks,
                "",
                "use a number of steps from 1, or leave it out to never compare ranks",
            )
        for name in ("dynamic_loss_coeff", "balance_loss_coeff"):
            coefficient = getattr(self, name)
            if coefficient is not None and coefficient < 0:
                raise SettingError(name, coefficient, "", "use 0 (off) or a positive number")
        for name in ("threshold", "inference_threshold", "initial_threshold"):
            value = getattr(self, name)
            if isinstance(value, float) and not 0 <= value <= 1:
                raise SettingError(
                    name,
                    value,
                    "",
                    "it is a cumulative probability, so use 0 (one expert) to 1 (all experts)",
                )
        if self.is_controlled:
            self._check_controller(num_experts)

    def _check_controller(self, num_experts: int) -> None:
        if self.target_experts_per_token is None:
            raise SettingError(
                "target_experts_per_token",
                None,
                f", which {{routing}} {self.routing!r} needs",
                "give the mean number of experts per token to hold, such as 2",
            )
        most = self.max_experts_per_token or num_experts
        for _, target in self.target_experts_per_token.points:
            if not 1 <= target <= most:
                reason = "{max_experts_per_token}" if self.max_experts_per_token else "all experts"
                raise SettingError(
                    "target_experts_per_token",
                    self.target_experts_per_token,
                    "",
                    f"every token uses at least 1 expert and at most {most} ({reason}), so use 1 "
                    f"to {most}",
                )
        low, high = self.min_threshold, self.max_threshold
        assert low is not None and high is not None
        if not 0 <= low < high <= 1:
            raise SettingError(
                "min_threshold",
                low,
                f" and {{max_threshold}} is {high}",
                "use 0 <= min < max <= 1",
            )
        if isinstance(self.initial_threshold, float) and not low <= self.initial_threshold <= high:
            raise SettingError(
                "initial_threshold",
                self.initial_threshold,
                "",
                f"it must lie between {{min_threshold}} ({low}) and {{max_threshold}} ({high})",
            )
        for name in ("proportional_gain", "integral_gain"):
            gain = getattr(self, name)
            if gain != AUTO and gain < 0:
                raise SettingError(
                    name,
                    gain,
                    "",
                    "a negative gain drives the count away from the target; use 'auto' or a "
                    "positive number",
                )
        if self.integral_gain == 0:
            raise SettingError(
                "integral_gain",
                self.integral_gain,
                "",
                "without it the count settles off the target; use 'auto' or a positive number",
            )


# Kind, help and choices of every field by its name, in order.
SETTINGS: dict[str, Setting] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(DynMoEConfig, include_extras=True).items()
}

_SHARED_DEFAULTS: dict[str, Any] = {
    "balance_loss": "seq_aux_loss",
    "row_buffer": "measured",
    "backend": AUTO,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    # "Harder Task Needs More Experts": p = 0.4, equation 4, alpha = 1e-2 and beta = 1e-4.
    "top_p": _SHARED_DEFAULTS
    | {
        "threshold": 0.4,
        "normalization": "none",
        "weights": "raw",
        "balance_loss_coeff": 1e-2,
        "dynamic_loss_coeff": 1e-4,
    },
    # DTop-p: renormalized weights, balance 1e-4, dynamic 1e-3.
    "dtop_p": _SHARED_DEFAULTS
    | {
        "scope": "global",
        "proportional_gain": AUTO,
        "integral_gain": AUTO,
        "initial_threshold": AUTO,
        "min_threshold": 0.0,
        "max_threshold": 1.0,
        "normalization": "drn",
        "weights": "renormalized",
        "balance_loss_coeff": 1e-4,
        "dynamic_loss_coeff": 1e-3,
    },
}
_ONLY_DTOP_P = (
    "target_experts_per_token",
    "scope",
    "proportional_gain",
    "integral_gain",
    "initial_threshold",
    "min_threshold",
    "max_threshold",
)


def _coerce(name: str, setting: Setting, value: Any) -> Any:
    """Convert one value from the command line, YAML or Python to its kind."""
    kind, choices = setting.kind, setting.choices
    if kind == "choice":
        if value not in choices:
            raise SettingError(name, value, "", f"use one of {', '.join(choices)}")
        return value
    if kind == "schedule":
        return value if isinstance(value, TargetSchedule) else TargetSchedule.parse(value)
    if kind == "float_or_auto" and value == AUTO:
        return AUTO
    wanted = "a whole number" if kind == "int" else "a number"
    if kind == "float_or_auto":
        wanted += " or 'auto'"
    try:
        number = float(value)
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError
        if kind == "int" and number != int(number):
            raise ValueError
    except (OverflowError, TypeError, ValueError):
        raise SettingError(name, value, "", f"use {wanted}") from None
    return int(number) if kind == "int" else number
