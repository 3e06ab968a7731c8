"""What resolved settings have to satisfy, alone and together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dynmoe.settings.messages.refusals import SettingError
from megatron_dynmoe.settings.routings import AUTO, CALIBRATED, CAPS, ROUTINGS

if TYPE_CHECKING:
    from megatron_dynmoe.settings.config import DynMoEConfig
    from megatron_dynmoe.settings.distribution import Target

_LARGEST_INTEGER = 2**63 - 1  # of a tensor


def check_settings(dynmoe: DynMoEConfig, given: DynMoEConfig, num_experts: int) -> None:
    """Refuse resolved settings that are out of range, or that contradict each other.

    Args:
        dynmoe: the settings with their defaults filled in.
        given: the settings without. A refusal names one of these, not what follows from it.
        num_experts: E.

    Raises:
        SettingError: a setting is wrong by itself, contradicts another, or does not fit
            ``num_experts``.
    """
    kind = ROUTINGS[dynmoe.routing]
    for name, remedy in kind.required.items():
        if getattr(dynmoe, name) is None:
            raise SettingError(name, None, f", which {{routing}} {dynmoe.routing!r} needs", remedy)
    for name in CAPS:
        cap = getattr(given, name)
        if cap is not None and not 1 <= cap <= num_experts:
            raise SettingError(
                name,
                cap,
                "",
                f"use 1 to {num_experts} (the number of experts), or leave it out",
            )
    if given.target_experts_per_token is not None:
        _check_target(given, given.target_experts_per_token, num_experts)
    if dynmoe.row_buffer == "worst_case" and "max_experts_per_token" not in kind.takes:
        raise SettingError(
            "row_buffer",
            "worst_case",
            f", but {{routing}} {dynmoe.routing!r} cannot keep to a cap, so the worst case is all "
            f"{num_experts} experts for every token",
            "leave {row_buffer} out",
        )
    if dynmoe.row_buffer == "worst_case" and dynmoe.max_experts_per_token is None:
        raise SettingError(
            "row_buffer",
            "worst_case",
            " and {max_experts_per_token} is not set, so the worst case is all "
            f"{num_experts} experts for every token",
            "set {max_experts_per_token}, or leave {row_buffer} out",
        )
    if dynmoe.row_buffer == "target" and "row_buffer_margin" not in kind.takes:
        raise SettingError(
            "row_buffer",
            "target",
            f", but {{routing}} {dynmoe.routing!r} holds no target, so the next step may need far "
            "more rows than the last",
            "leave {row_buffer} out",
        )
    if dynmoe.row_buffer_margin is not None and dynmoe.row_buffer_margin < 0:
        raise SettingError(
            "row_buffer_margin",
            dynmoe.row_buffer_margin,
            "",
            "use 0 (room for the mean alone) or a positive share, such as 0.1",
        )
    if dynmoe.check_ranks is not None and dynmoe.check_ranks < 1:
        raise SettingError(
            "check_ranks",
            dynmoe.check_ranks,
            "",
            "use a number of steps from 1, or leave it out to never compare ranks",
        )
    decay = dynmoe.threshold_decay
    if decay is not None and not 0 <= decay < 1:
        raise SettingError(
            "threshold_decay",
            decay,
            "",
            "use 0 (the last batch alone) or more, below 1, such as 0.99",
        )
    for name in ("dynamic_loss_coeff", "balance_loss_coeff"):
        coefficient = getattr(dynmoe, name)
        if coefficient is not None and coefficient < 0:
            raise SettingError(name, coefficient, "", "use 0 (off) or a positive number")
    for name in ("threshold", "inference_threshold", "initial_threshold"):
        value = getattr(dynmoe, name)
        if isinstance(value, float) and not kind.knob_range[0] <= value <= kind.knob_range[1]:
            raise SettingError(name, value, "", kind.knob_remedy)
    if dynmoe.null_slots is not None:
        _check_null_slots(dynmoe, given, dynmoe.null_slots)
    if kind.balance_holds_count and dynmoe.balance_loss == "none":
        raise SettingError(
            "balance_loss",
            "none",
            f", and with {{routing}} {dynmoe.routing!r} its gradient is what holds the count",
            "use aux_loss (as in the paper), seq_aux_loss or global_aux_loss",
        )
    if dynmoe.is_controlled:
        _check_controller(dynmoe, given)


def _check_target(given: DynMoEConfig, wanted: Target, num_experts: int) -> None:
    most = given.max_experts_per_token or num_experts
    least = ROUTINGS[given.routing].least_experts
    for target in wanted.targets:
        if not (least <= target <= most and target > 0):
            fewest = "every token uses at least 1 expert" if least else "a token may use none"
            reason = "{max_experts_per_token}" if most < num_experts else "all experts"
            raise SettingError(
                "target_experts_per_token",
                wanted,
                "",
                f"{fewest} and at most {most} ({reason}), "
                f"so use {least or 'more than 0'} to {most}",
            )
    if not given.is_controlled and len(wanted.targets) > 1:
        raise SettingError(
            "target_experts_per_token",
            wanted,
            f", and {{routing}} {given.routing!r} takes as many in every step",
            "give one number, such as 2",
        )


def _check_null_slots(dynmoe: DynMoEConfig, given: DynMoEConfig, null_slots: int) -> None:
    # The largest cap; of two that are alike, the one that was given.
    name = max(CAPS, key=lambda cap: (getattr(dynmoe, cap), getattr(given, cap) is not None))
    slots = getattr(dynmoe, name)
    if null_slots < slots:
        whose = f"of a token ({{{name}}})"
        if getattr(given, name) is None:
            whose = "that a token has unless {max_experts_per_token} is given"
        raise SettingError(
            "null_slots",
            null_slots,
            f", fewer than the {slots} slots {whose}",
            f"use {slots} or more, so that any number of slots can be null",
        )
    if null_slots > _LARGEST_INTEGER:
        raise SettingError(
            "null_slots", null_slots, "", f"use {slots} to {_LARGEST_INTEGER} (64 bits)"
        )


def _check_controller(dynmoe: DynMoEConfig, given: DynMoEConfig) -> None:
    kind = ROUTINGS[dynmoe.routing]
    auto = "'auto' or " if kind.is_calibrated else ""
    if dynmoe.control_law == "sign" and dynmoe.proportional_gain:
        raise SettingError(
            "proportional_gain",
            dynmoe.proportional_gain,
            " and {control_law} is 'sign'",
            "remove {proportional_gain} (the knob moves by {integral_gain} in every step), or set "
            "{control_law} to 'pi'",
        )
    for name in CALIBRATED:
        if getattr(dynmoe, name) == AUTO and not kind.is_calibrated:
            raise SettingError(
                name,
                AUTO,
                f", and no count can be computed from the knob of {{routing}} {dynmoe.routing!r}",
                f"give a number, or leave it out ({kind.defaults_of(dynmoe)[name]:g})",
            )
    if dynmoe.drawn_target is not None:
        _check_drawn_target(dynmoe)
    low, high = dynmoe.min_threshold, dynmoe.max_threshold
    assert low is not None and high is not None
    lowest, highest = kind.knob_range
    bounds = {"min_threshold": low, "max_threshold": high}
    if not lowest <= low < high <= highest:
        name, other = sorted(bounds, key=lambda bound: getattr(given, bound) is None)
        raise SettingError(
            name,
            bounds[name],
            f" and {{{other}}} is {bounds[other]}",
            f"use {lowest:g} <= min < max <= {highest:g}",
        )
    first = dynmoe.initial_threshold
    if isinstance(first, float) and not low <= first <= high:
        between = f"between {{min_threshold}} ({low}) and {{max_threshold}} ({high})"
        if given.initial_threshold is None:
            name = "min_threshold" if first < low else "max_threshold"
            raise SettingError(
                name,
                bounds[name],
                f", and {{initial_threshold}} is {first} by default",
                f"give one {between}",
            )
        raise SettingError("initial_threshold", first, "", f"it must lie {between}")
    for name in ("proportional_gain", "integral_gain"):
        gain = getattr(dynmoe, name)
        if gain != AUTO and gain < 0:
            raise SettingError(
                name,
                gain,
                "",
                f"a negative gain drives the count away from the target; use {auto}a positive "
                "number",
            )
    if dynmoe.integral_gain == 0:
        raise SettingError(
            "integral_gain",
            dynmoe.integral_gain,
            "",
            f"without it the count settles off the target; use {auto}a positive number",
        )


def _check_drawn_target(dynmoe: DynMoEConfig) -> None:
    """Refuse what means one threshold, or one target, if there is a map from one to the other."""
    if not ROUTINGS[dynmoe.routing].draws_target:
        others = " or ".join(name for name, kind in ROUTINGS.items() if kind.draws_target)
        raise SettingError(
            "target_experts_per_token",
            dynmoe.drawn_target,
            f", and {{routing}} {dynmoe.routing!r} cannot follow a target of each step's own",
            f"give one target, or use {{routing}} {others}",
        )
    for name in CALIBRATED:
        if getattr(dynmoe, name) != AUTO:
            raise SettingError(
                name,
                getattr(dynmoe, name),
                f", and {{target_experts_per_token}} is {dynmoe.drawn_target}, for which each of "
                "several targets has its own",
                "leave it out ('auto'), or give one target",
            )
    if dynmoe.row_buffer == "target":
        raise SettingError(
            "row_buffer",
            "target",
            f", and {{target_experts_per_token}} is {dynmoe.drawn_target}: the next step may need "
            "far more rows than the last",
            "leave {row_buffer} out, use 'worst_case' with {max_experts_per_token}, or give one "
            "target",
        )
