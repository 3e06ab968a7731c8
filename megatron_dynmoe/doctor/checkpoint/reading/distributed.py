"""Reads Megatron's ``torch_dist`` checkpoints part by part."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_dynmoe.conversion.megatron.checkpoint import MegatronCheckpoint
from megatron_dynmoe.data.finding import FAILED, Check
from megatron_dynmoe.doctor.checkpoint.reading.parts import (
    MASTER,
    MOMENT,
    OPTIMIZER_STATE,
    RESTORE,
    WEIGHT,
    Part,
    cut,
    place_of,
    unread,
)

_OF_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")
_MASTERS = ("param", "fp32_param", "master_param")
# The distributed optimizer's default format: all parameters of a rank in one flat tensor. Each
# begins at a multiple of this; upstream saves whatever lies between.
_IN_BUCKETS = ".distributed.dp_group_idx_"
_ALIGNED = 64


class Distributed:
    """See :class:`megatron_dynmoe.doctor.checkpoint.reading.parts.Opened`."""

    def __init__(self, folder: Path) -> None:
        """Open the folder of one iteration.

        Raises:
            ValueError: it is incomplete or damaged.
        """
        self.folder = folder
        self._checkpoint = MegatronCheckpoint(folder)
        self.args: Namespace | None = self._checkpoint.args
        self.iteration: int | None = self._checkpoint.iteration
        self.states: list[tuple[str, Any]] = [("common_state", self._checkpoint.common)]
        self.faults: list[Check] = [*self._uncovered()]
        for key in self._checkpoint.objects:
            if _OF_OPTIMIZER.match(key):
                try:
                    self.states.append((key, self._checkpoint.read_object(key)))
                except ValueError as error:
                    self.faults.append(unread(key, error))
        tensors = [(key, _kind(key)) for key in self._checkpoint.tensors]
        self._dtypes = {
            place_of(key)[0]: self._checkpoint.dtype(key)
            for key, (kind, _) in tensors
            if kind == WEIGHT
        }

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.distcp"))

    def weight_dtype(self, row: str) -> torch.dtype | None:
        return self._dtypes.get(row)

    def parts(self) -> Iterator[Part | Check]:
        for part in self._checkpoint.parts():
            if _is_padding(part.key, part.offsets, part.sizes):
                continue
            kind, name = _kind(part.key)
            try:
                tensor = self._checkpoint.read_part(part)
                for row, layer, expert, place, own in cut(name, tensor, part.offsets):
                    shown = part.key.removesuffix(name) + row if kind == MOMENT else row
                    yield Part(part.file, shown, kind, layer, expert, place, own)
            except (ValueError, OSError) as error:
                yield unread(str(self.folder / part.file), error)

    def _uncovered(self) -> Iterator[Check]:
        """Entries of which a part was not saved, or was taken out."""
        held: Counter[str] = Counter()
        for part in self._checkpoint.parts():
            held[part.key] += math.prod(part.sizes)
        for key in self._checkpoint.tensors:
            size = math.prod(self._checkpoint.shape(key))
            if held[key] != size:
                found = f"{self.folder / '.metadata'}: of the {size} numbers of {key}, the files "
                yield Check("files", FAILED, f"{found}hold {held[key]}", RESTORE)


def _kind(key: str) -> tuple[str, str]:
    """What an entry is, and the name of the parameter that it is or belongs to."""
    if found := OPTIMIZER_STATE.match(key):
        return (MASTER if found[1] in _MASTERS else MOMENT), found[2]
    return (MOMENT if _OF_OPTIMIZER.match(key) else WEIGHT), key


def _is_padding(key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    return (
        _IN_BUCKETS in key
        and len(sizes) == 1
        and sizes[0] < _ALIGNED
        and offsets[0] % _ALIGNED != 0
    )
