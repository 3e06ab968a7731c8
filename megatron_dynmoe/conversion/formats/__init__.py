"""Formats: the layouts of Hugging Face folders. All that is special to one is in one file.

The ``FORMAT`` of each file is listed here and nowhere else: ``--format``, the table in the docs and
the tests use :data:`FORMATS`. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dynmoe.conversion.formats import (
    dynamic_moe,
    dynmoe,
    llama,
    mixtral,
    qwen3,
    qwen3_moe,
)
from megatron_dynmoe.conversion.formats.format import Format
from megatron_dynmoe.conversion.hugging_face.words import CONFIG
from megatron_dynmoe.storage.json_files import read_json

# The order is that of --help and of the docs. A folder has the first format that recognizes it.
FORMATS: dict[str, Format] = {
    record.FORMAT.name: record.FORMAT
    for record in (dynmoe, mixtral, qwen3_moe, dynamic_moe, llama, qwen3)
}
OURS = dynmoe.FORMAT


def format_named(name: str) -> Format:
    """The format with this name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}: use one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def format_in(folder: Path) -> Format:
    """The format of a Hugging Face folder.

    Raises:
        ValueError: its ``config.json`` is missing, damaged or of no format.
    """
    theirs = read_json(folder / CONFIG)
    try:
        return format_of(theirs)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None


def format_of(theirs: dict[str, Any]) -> Format:
    """The format of a ``config.json``.

    Raises:
        ValueError: it is of no known format.
    """
    for format in FORMATS.values():
        if format.recognizes(theirs):
            return format
    raise ValueError(
        f"model_type is {theirs.get('model_type')!r} and architectures "
        f"{theirs.get('architectures')}: the formats that can be read are "
        f"{', '.join(FORMATS)} (docs/huggingface.md)."
    )
