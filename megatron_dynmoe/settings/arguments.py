"""From the ``--moe-dynamic-*`` flags and the ``DYNMOE_CONFIG`` file to a DynMoEConfig."""

from __future__ import annotations

import dataclasses
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_dynmoe.settings.config import BALANCE_LOSSES, SETTINGS, DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import FlagError, SettingError, flag

PREFIX = "moe_dynamic_"


def add_dynmoe_args(parser: ArgumentParser) -> ArgumentParser:
    """Add one flag per field of DynMoEConfig; this is Megatron's ``extra_args_provider``.

    Every flag defaults to None, which shows that it was not given.
    """
    group = parser.add_argument_group("dynamic routing (megatron_dynmoe)")
    for name, setting in SETTINGS.items():
        group.add_argument(
            flag_of(name),
            # A bad choice is a ValueError like every bad value, so argparse does not check it.
            metavar="|".join(setting.choices) or setting.kind.upper(),
            help=setting.help.replace("%", "%%"),
        )
    # Upstream's defaults for these look the same as a user's choice, so None replaces them.
    parser.set_defaults(
        moe_router_load_balancing_type=None, moe_aux_loss_coeff=None, transformer_impl=None
    )
    return parser


def flag_of(name: str) -> str:
    """Return the flag of a field."""
    return f"--{PREFIX}{name}".replace("_", "-")


@contextmanager
def naming_flags(args: Namespace) -> Iterator[None]:
    """Make error messages name settings by their flags, unless ``DYNMOE_CONFIG`` sets them.

    Raises:
        ValueError: the block raised a :class:`SettingError`, which this error replaces.
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
    """Read the settings in the YAML file that ``DYNMOE_CONFIG`` names; None if it is not set."""
    path = os.environ.get("DYNMOE_CONFIG")
    return DynMoEConfig.from_yaml(path) if path else None


def config_from_args(args: Namespace) -> DynMoEConfig:
    """Read the settings of the YAML file, overridden by the given flags.

    Raises:
        ValueError: a flag's value is of the wrong kind.
    """
    base = config_from_environment() or DynMoEConfig()
    if getattr(args, PREFIX + "routing", None) == "top_k":
        # One flag turns any file of settings into the baseline, with the same back end.
        base = DynMoEConfig(backend=base.backend)
    flags = {name: getattr(args, PREFIX + name, None) for name in SETTINGS}
    given = {name: value for name, value in flags.items() if value is not None}
    with naming_flags(args):
        config = dataclasses.replace(base, **given)
    return config.seeded(getattr(args, "seed", 1234))


def resolved_from_args(args: Namespace, num_experts: int | None) -> DynMoEConfig:
    """Read settings as :func:`config_from_args` does, fill in the defaults and check them all.

    Raises:
        ValueError: a setting is wrong by itself, contradicts another, or does not fit
            ``num_experts``.
    """
    config = config_from_args(args)
    with naming_flags(args):
        return config.resolve(num_experts)


def adapt_balance_loss(args: Namespace, config: DynMoEConfig) -> DynMoEConfig:
    """Give upstream's balance-loss flags their meaning for the chosen routing.

    With stock top-k, upstream's own defaults apply again. With dynamic routing our router computes
    the loss. The flags then move into the config, and upstream computes and reports no such loss.

    Raises:
        ValueError: upstream's flag and ours contradict each other.
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
    """Take over ``--moe-router-load-balancing-type`` and ``--moe-aux-loss-coeff`` if given.

    Raises:
        ValueError: the flags ask for several losses or an unknown one, or upstream's flag and ours
            differ.
    """
    given: dict[str, Any] = {}
    for name, upstreams, value in (
        ("balance_loss", "moe_router_load_balancing_type", kinds),
        ("balance_loss_coeff", "moe_aux_loss_coeff", coefficients),
    ):
        if isinstance(value, list | tuple):
            if len(value) != 1:
                remedy = "dynamic routing takes one balance loss; give one"
                raise FlagError(upstreams, str(list(value)), "", remedy)
            value = value[0]
        ours = getattr(config, name)
        if value is None:
            continue
        if name == "balance_loss" and value not in BALANCE_LOSSES:
            raise FlagError(
                upstreams,
                value,
                ", which dynamic routing does not have",
                f"use one of {', '.join(BALANCE_LOSSES)}",
            )
        if ours is not None and ours != value:
            raise SettingError(
                name,
                ours,
                f" and {flag(upstreams)} is {value}",
                "they set the same thing; give one",
            )
        given[name] = value
    return dataclasses.replace(config, **given)
