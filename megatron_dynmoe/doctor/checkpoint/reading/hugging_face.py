"""Reads an exported Hugging Face folder part by part."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_dynmoe.conversion.hugging_face.folder import ModelFolder
from megatron_dynmoe.data.finding import Check
from megatron_dynmoe.doctor.checkpoint.reading.parts import (
    WEIGHT,
    Part,
    is_stacked,
    place_of,
    unread,
)


class HuggingFace:
    """See :class:`megatron_dynmoe.doctor.checkpoint.reading.parts.Opened`."""

    args: Namespace | None = None
    iteration: int | None = None

    def __init__(self, folder: Path) -> None:
        """Open a folder.

        Raises:
            ValueError: a file is missing, damaged or of another kind.
        """
        self.folder = folder
        self._weights = ModelFolder(folder)
        self.states: list[tuple[str, Any]] = []
        self.faults: list[Check] = []

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def weight_dtype(self, row: str) -> torch.dtype | None:
        return None  # there is no optimizer

    def parts(self) -> Iterator[Part | Check]:
        weights = self._weights
        for key in sorted(weights.keys, key=lambda key: (weights.file_of(key), key)):
            file = weights.file_of(key)
            try:
                row, layer, expert = place_of(key)
                if is_stacked(row):  # one by one: all of a layer's experts may be much
                    for expert in range(weights.shape(key)[0]):
                        own = weights.read(key, expert)
                        yield Part(file.name, row, WEIGHT, layer, expert, (), own)
                else:
                    yield Part(file.name, row, WEIGHT, layer, expert, (), weights.read(key))
            except (ValueError, OSError) as error:
                yield unread(str(file), error)
