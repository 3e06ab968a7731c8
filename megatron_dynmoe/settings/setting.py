"""One setting: its kind, its help, and its value from a command line, YAML or Python."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from megatron_dynmoe.settings.distribution import TargetDistribution, parse_target
from megatron_dynmoe.settings.messages.refusals import SettingError
from megatron_dynmoe.settings.routings import AUTO, DYNAMIC
from megatron_dynmoe.settings.schedule import TargetSchedule


class Setting(NamedTuple):
    """The kind of a field's value, its help text and its choices.

    :data:`~megatron_dynmoe.settings.config.SETTINGS` has those of all fields.
    """

    kind: str
    help: str
    choices: tuple[str, ...] = ()


def coerce(name: str, setting: Setting, value: Any) -> Any:
    """Convert one value from the command line, YAML or Python to its kind.

    Raises:
        SettingError: the value is of another kind.
    """
    kind, choices = setting.kind, setting.choices
    if kind == "choice":
        if value not in choices:
            raise SettingError(name, value, "", f"use one of {', '.join(choices)}")
        return value
    if kind == "schedule":
        is_read = isinstance(value, TargetSchedule | TargetDistribution)
        return value if is_read else parse_target(value)
    if kind == "float_or_auto" and value == AUTO:
        return AUTO
    wanted = "a whole number" if kind == "int" else "a number"
    if kind == "float_or_auto":
        wanted += " (or 'auto', where it can be computed)"
    try:
        number = float(value)
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError
        if kind == "int" and number != int(number):
            raise ValueError
    except (OverflowError, TypeError, ValueError):
        raise SettingError(name, value, "", f"use {wanted}") from None
    return int(number) if kind == "int" else number


def described(name: str, setting: Setting) -> Setting:
    """Add to a help text which routings have the setting, and their defaults."""
    if name == "routing":
        return setting
    kinds = {routing: kind for routing, kind in DYNAMIC.items() if name in kind.takes}
    words = [setting.help]
    if len(kinds) < len(DYNAMIC):
        words.append(f"Only with {', '.join(kinds)}.")
    routings_of: dict[Any, list[str]] = {}
    for routing, kind in kinds.items():
        if name in kind.defaults:
            routings_of.setdefault(kind.defaults[name], []).append(routing)
    num_with_default = sum(map(len, routings_of.values()))
    if len(routings_of) == 1 and num_with_default == len(kinds):
        words.append(f"Default: {_shown(next(iter(routings_of)))}.")
    elif routings_of:
        each = [f"{_shown(value)} for {', '.join(names)}" for value, names in routings_of.items()]
        words.append(f"Default: {', '.join(each)}.")
    return setting._replace(help=" ".join(words))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
