"""The settings of the Megatron that is imported, as far as they may concern routing."""

from __future__ import annotations

import dataclasses
import re
from argparse import ArgumentParser
from collections.abc import Iterable
from typing import Any

CONCERNS_US = re.compile("moe|mtp|expert|router|cuda_graph|^fp[48]$|^transformer_impl$")
# Flags of other programs: reinforcement learning and inference servers.
OTHER_PROGRAMS = re.compile("^rl_|^inference_|^decode_only_")


def parser() -> ArgumentParser:
    """Megatron's own, with all its flags."""
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def flags() -> dict[str, Any]:
    """Defaults of the command line's flags."""
    return {action.dest: action.default for action in parser()._actions}


def fields() -> dict[str, Any]:
    """Defaults of the fields of a model's configuration; None for one without."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    none = dataclasses.MISSING
    return {
        field.name: None if field.default is none else field.default
        for field in dataclasses.fields(MLATransformerConfig)
    }


def unknown(flags: Iterable[str], fields: Iterable[str]) -> set[str]:
    """Settings that may concern routing, and whose effect on it nobody has judged."""
    from megatron_dynmoe.settings.upstream_flags import UPSTREAM_FLAGS

    concern = {name for name in flags if not OTHER_PROGRAMS.search(name)} | {*fields}
    return {name for name in concern if CONCERNS_US.search(name)} - UPSTREAM_FLAGS.keys()
