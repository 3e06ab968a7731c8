"""The ``--moe-dynamic-*`` flags and ``DYNMOE_CONFIG``: from the user's words to a DynMoEConfig."""

from __future__ import annotations

import dataclasses
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_dynmoe.settings.config import BALANCE_LOSSES, SETTINGS, DynMoEConfig
from megatron_dynmoe.settings.refusals import SettingError

PREFIX = "moe_dynamic_"


def add_dynmoe_args(parser: ArgumentParser) -> ArgumentParser:
    """Add one flag per field of DynMoEConfig; Megatron's ``extra_args_provider``.

    All default to None, so that a flag that was given can be told from one that was not.
    """
    group = parser.add_argument_group("dynamic routing (megatron_dynmoe)")
    for name, setting in SETTINGS.items():
        group.add_argument(
            flag_of(name),
            # Not argparse's choices: like every bad value, a bad choice is a ValueError.
            metavar="|".join(setting.choices) or setting.kind.upper(),
            help=setting.help.replace("%", "%%"),
        )
    # Upstream's defaults for these cannot be told from a user's choice; None can.
    parser.set_defaults(
        moe_router_load_balancing_type=None, moe_aux_loss_coeff=None, transformer_impl=None
    )
    return parser


def flag_of(name: str) -> str:
    """The flag of a field."""
    return f"--{PREFIX}{name}".replace("_", "-")


@contextmanager
def naming_flags(args: Namespace) -> Iterator[None]:
    """Have refusals name settings by their flags, but those that come from ``DYNMOE_CONFIG``.

    Raises:
        ValueError: in place of a :class:`SettingError` of the block.
    """
    try:
        yield
    except SettingError as error:
        config = config_from_environment()
        in_file = config.to_dict() if config else {}

        def as_given(name: str) -> str:
            is_flag = name not in in_file or getattr(args, PREFIX + name, None) is not None
            return flag_of(name) if is_flag else name

        raise ValueError(error.worded(as_given)) from None


def config_from_environment() -> DynMoEConfig | None:
    """The settings in the YAML file that ``DYNMOE_CONFIG`` names, or None where it is not set."""
    path = os.environ.get("DYNMOE_CONFIG")
    return DynMoEConfig.from_yaml(path) if path else None


def config_from_args(args: Namespace) -> DynMoEConfig:
    """The settings of the YAML file, overridden by the flags that were given.

    Raises:
        ValueError: a flag's value is not of its kind.
    """
    base = config_from_environment() or DynMoEConfig()
    if getattr(args, PREFIX + "routing", None) == "top_k":
        # The baseline is one flag away from any file of settings, on the same back end.
        base = DynMoEConfig(backend=base.backend)
    flags = {name: getattr(args, PREFIX + name, None) for name in SETTINGS}
    given = {name: value for name, value in flags.items() if value is not None}
    with naming_flags(args):
        return dataclasses.replace(base, **given)


def resolved_from_args(args: Namespace, num_experts: int | None) -> DynMoEConfig:
    """As :func:`config_from_args`, with the defaults filled in and all settings checked.

    Raises:
        ValueError: a setting makes no sense, alone, with another, or for ``num_experts``.
    """
    config = config_from_args(args)
    with naming_flags(args):
        return config.resolve(num_experts)


def settle_balance_loss(args: Namespace, config: DynMoEConfig) -> DynMoEConfig:
    """Give upstream's balance-loss flags their meaning for the chosen routing.

    With stock top-k, upstream's own defaults return. With dynamic routing the loss is ours, so the
    flags move into the config and upstream computes and reports none.

    Raises:
        ValueError: upstream's flag and ours say different things.
    """
    kinds, coefficients = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    if not config.is_dynamic:
        if kinds is None:
            args.moe_router_load_balancing_type = "aux_loss"
        if coefficients is None:
            args.moe_aux_loss_coeff = 0.0
        return config
    args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = "none", 0.0
    with naming_flags(args):
        return adopt_upstream_balance_loss(config, kinds, coefficients)


def adopt_upstream_balance_loss(
    config: DynMoEConfig, kinds: str | list[str] | None, coefficients: float | list[float] | None
) -> DynMoEConfig:
    """Take over ``--moe-router-load-balancing-type`` and ``--moe-aux-loss-coeff`` where given.

    Raises:
        ValueError: several losses or an unknown one are asked for, or upstream's flag and ours
            differ.
    """
    given: dict[str, Any] = {}
    for name, flag, value in (
        ("balance_loss", "--moe-router-load-balancing-type", kinds),
        ("balance_loss_coeff", "--moe-aux-loss-coeff", coefficients),
    ):
        if isinstance(value, list | tuple):
            if len(value) != 1:
                raise ValueError(
                    f"{flag} is {list(value)}: dynamic routing takes one balance loss; give one."
                )
            value = value[0]
        ours = getattr(config, name)
        if value is None:
            continue
        if name == "balance_loss" and value not in BALANCE_LOSSES:
            raise ValueError(
                f"{flag} is {value}, which dynamic routing does not have: use one of "
                f"{', '.join(BALANCE_LOSSES)}."
            )
        if ours is not None and ours != value:
            raise SettingError(
                name, ours, f" and {flag} is {value}", "they set the same thing; give one"
            )
        given[name] = value
    return dataclasses.replace(config, **given)
