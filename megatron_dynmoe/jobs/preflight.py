"""Checks a run before it gets a GPU: its layout, its routing, its files and its flags."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_dynmoe.data.check import prefix_remedy
from megatron_dynmoe.planning.layout import Layout, check_layout
from megatron_dynmoe.settings.arguments import PREFIX, naming_flags, resolved_from_args
from megatron_dynmoe.settings.config import SETTINGS, DynMoEConfig
from megatron_dynmoe.settings.messages.words import is_number, values_of, whole_number

LENGTH_FLAGS = ("train-iters", "train-samples")
_DATA_FLAGS = ("data-path", "train-data-path", "data-args-path", "per-split-data-args-path")


def check_run(flags: Sequence[str], world_size: int) -> None:
    """Check everything that can be known without torch.

    Args:
        flags: the whole command line of ``megatron_dynmoe.pretrain``.
        world_size: the number of processes.

    Raises:
        ValueError: the message names what is wrong, its value and the remedy.
    """
    layout = Layout.from_flags(flags, world_size)
    check_layout(layout)
    check_length(flags)
    check_routing(flags, layout.num_experts)
    check_files(flags)


def check_length(flags: Sequence[str]) -> None:
    """Check that the length of the run is a whole number of steps or sequences.

    Raises:
        ValueError: the message names the flag and its value.
    """
    values = values_of(flags)
    for name in LENGTH_FLAGS:
        whole_number(values, name, default=0, least=0)


def check_routing(flags: Sequence[str], num_experts: int) -> None:
    """Check that the ``--moe-dynamic-*`` flags, over ``DYNMOE_CONFIG``, go together.

    Raises:
        ValueError: as :class:`~megatron_dynmoe.settings.config.DynMoEConfig` raises it.
    """
    settings = {}
    for name, values in values_of(flags).items():
        argument = name.replace("-", "_")
        if not argument.startswith(PREFIX):
            continue
        field = argument.removeprefix(PREFIX)
        if field in SETTINGS and len(values) != 1:
            given = " ".join(values) or "without a value"
            raise ValueError(f"--{name} is {given}: give one value.")
        settings[field] = "".join(values)
    args = Namespace(**{PREFIX + field: value for field, value in settings.items()})
    with naming_flags(args):
        DynMoEConfig.from_dict(settings, "the command line")  # it knows the names
    resolved_from_args(args, num_experts)


def check_files(flags: Sequence[str]) -> None:
    """Check that data and tokenizer are at the paths that the flags give.

    Raises:
        ValueError: the message names the file that is missing.
    """
    values = values_of(flags)
    if "mock-data" in values:
        return
    given = [name for name in _DATA_FLAGS if name in values]
    if not given:
        raise ValueError(
            "there is no data: give --data-path PREFIX (as dynmoe preprocess wrote it, "
            "without .bin), or --mock-data to try without."
        )
    for name in given:
        for path in values[name]:
            if is_number(path):  # the weight of the next prefix
                continue
            endings = ("",) if name.endswith("args-path") else (".bin", ".idx")
            for file in (f"{path}{ending}" for ending in endings):
                if not Path(file).is_file():
                    remedy = "name a file that lists prefixes"
                    if file != path:
                        remedy = prefix_remedy(path)
                    raise ValueError(
                        f"--{name} names {path}, but there is no file {file}{_place(file)}: "
                        f"{remedy}"
                    )
    tokenizer = values.get("tokenizer-model")
    kind = "".join(values.get("tokenizer-type", []))
    if tokenizer is None:
        if not kind.startswith("Null"):
            raise ValueError(
                f"--tokenizer-model is missing: --tokenizer-type {kind} needs its file or folder."
            )
    elif not Path("".join(tokenizer)).exists():
        file = "".join(tokenizer)
        raise ValueError(
            f"--tokenizer-model is {file}, but there is no such file or folder{_place(file)}."
        )


def _place(path: str) -> str:
    """Say which folder a relative path starts from: not the one that the file of flags is in."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}"
