"""What is checked before a run gets a GPU: its layout, its routing, its files. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_dynmoe.config import SETTINGS, DynMoEConfig
from megatron_dynmoe.layout import Layout, check_layout
from megatron_dynmoe.recipes import values_of

_DYNAMIC = "moe-dynamic-"
_DATA_FLAGS = ("data-path", "train-data-path", "data-args-path", "per-split-data-args-path")


def check_run(flags: Sequence[str], world_size: int) -> None:
    """Check everything that can be known without torch.

    Args:
        flags: the whole command line of ``megatron_dynmoe.pretrain``.
        world_size: the number of processes.

    Raises:
        ValueError: names what is wrong, its value and the remedy.
    """
    layout = Layout.from_flags(flags, world_size)
    check_layout(layout)
    check_routing(flags, layout.num_experts)
    check_files(flags)


def check_routing(flags: Sequence[str], num_experts: int) -> None:
    """Check the ``--moe-dynamic-*`` flags against each other.

    Raises:
        ValueError: see :class:`~megatron_dynmoe.config.DynMoEConfig`.
    """
    settings = {}
    for name, values in values_of(flags).items():
        if not name.startswith(_DYNAMIC):
            continue
        field = name.removeprefix(_DYNAMIC).replace("-", "_")
        if field in SETTINGS and len(values) != 1:
            raise ValueError(
                f"--{name} is {' '.join(values) or 'without a value'}: give one value."
            )
        settings[field] = "".join(values)
    DynMoEConfig.from_dict(settings, "the command line").resolve(num_experts)


def check_files(flags: Sequence[str]) -> None:
    """Check that data and tokenizer are where the flags say.

    Raises:
        ValueError: names the file that is missing.
    """
    values = values_of(flags)
    if "mock-data" in values:
        return
    given = [name for name in _DATA_FLAGS if name in values]
    if not given:
        raise ValueError(
            "there is no data: give --data-path PREFIX (as tools/preprocess_data.py wrote it, "
            "without .bin), or --mock-data to try without."
        )
    for name in given:
        for path in values[name]:
            if _is_number(path):  # the weight of the next prefix
                continue
            endings = ("",) if name.endswith("args-path") else (".bin", ".idx")
            for missing in (
                f"{path}{end}" for end in endings if not Path(f"{path}{end}").is_file()
            ):
                raise ValueError(
                    f"--{name} names {path}, but there is no file {missing}: give the prefix that "
                    "tools/preprocess_data.py wrote, without .bin."
                )
    tokenizer = values.get("tokenizer-model")
    kind = "".join(values.get("tokenizer-type", []))
    if tokenizer is None:
        if not kind.startswith("Null"):
            raise ValueError(
                f"--tokenizer-model is missing: --tokenizer-type {kind} needs its file or folder."
            )
    elif not Path("".join(tokenizer)).exists():
        raise ValueError(f"--tokenizer-model is {''.join(tokenizer)}, but there is nothing there.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
