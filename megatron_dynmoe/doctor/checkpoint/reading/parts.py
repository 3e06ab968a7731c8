"""One tensor of one layer and expert, whatever the format that holds it."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_dynmoe.data.finding import FAILED, Check

# What a part is: a parameter of the model, the optimizer's own copy of one, or what else it keeps.
WEIGHT, MASTER, MOMENT = "weight", "master", "moment"

# The key of a state of the optimizer: its name, and that of the parameter.
OPTIMIZER_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+?)\.(.+)")
_LAYER = re.compile(r"(?<!\w)layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(?:experts\.|local_experts\.)?(\d+)\.")
_EXPERT_AT_END = re.compile(r"(\.experts\.linear_fc\d\.(?:weight|bias))(\d+)$")
# Entries with all experts along one dimension.
_STACKED = re.compile(r"\.experts\.(?:experts\.linear_fc\d\.\w+|weight\d|gate_up_proj|down_proj)$")
_OF_EXPERTS = re.compile(r"\.experts?\.|\.experts?_|router|shared_expert|block_sparse_moe")


class Part(NamedTuple):
    """A part of a tensor, with its place in the model.

    Attributes:
        file: the file that it comes from.
        row: its name without the numbers of layer and expert.
        kind: ``WEIGHT``, ``MASTER`` or ``MOMENT``.
        layer, expert: their numbers, from 0; None if it belongs to none.
        place: where in the tensor of this layer and expert it lies.
        tensor: the numbers.
    """

    file: str
    row: str
    kind: str
    layer: int | None
    expert: int | None
    place: tuple[int, ...]
    tensor: Tensor


class Opened(Protocol):
    """A checkpoint that is open for looking.

    Attributes:
        folder: the folder with the files.
        args: Megatron's arguments; None in an exported folder.
        iteration: of the saved state; None in an exported folder.
        states: plain objects that hold steps of the optimizer or the schedule, with their places.
        faults: what was wrong when it was opened.
    """

    folder: Path
    args: Namespace | None
    iteration: int | None
    states: list[tuple[str, Any]]
    faults: list[Check]

    def parts(self) -> Iterator[Part | Check]:
        """Every part of every tensor, in the order of the files; a failed check for unread ones."""

    def weight_dtype(self, row: str) -> torch.dtype | None:
        """The type of a parameter of the model."""

    @property
    def num_bytes(self) -> int:
        """Of all files that are read."""


def place_of(name: str) -> tuple[str, int | None, int | None]:
    """The row of a tensor's name, and the layer and expert that are in it."""
    layer = expert = None
    if found := _LAYER.search(name):
        layer = int(found[1])
        name = name[: found.start(1)] + name[found.end(1) + 1 :]
    if found := _EXPERT.search(name):
        expert = int(found[1])
        name = name[: found.start(1)] + name[found.end(1) + 1 :]
    elif found := _EXPERT_AT_END.search(name):
        expert = int(found[2])
        name = name[: found.start(2)]
    return name, layer, expert


def cut(
    name: str, tensor: Tensor, offsets: Iterable[int]
) -> Iterator[tuple[str, int | None, int | None, tuple[int, ...], Tensor]]:
    """Cut what holds several layers or experts into one part for each.

    Args:
        name: the entry's, with layer and expert if it has numbers of them.
        offsets: where in its entry the tensor begins, by dimension.

    Yields:
        row, layer, expert, place and tensor of a :class:`Part`.
    """
    row, layer, expert = place_of(name)
    has_layers = layer is None and ".layers." in row
    has_experts = expert is None and is_stacked(row)
    starts = list(offsets)
    if tensor.dim() < has_layers + has_experts:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, too few dimensions")
    layers: Iterable[tuple[int | None, Tensor]] = [(layer, tensor)]
    if has_layers:
        layers = enumerate(tensor, starts.pop(0))
    first = starts.pop(0) if has_experts else 0
    for number, one in layers:
        if has_experts:
            for index, own in enumerate(one, first):
                yield row, number, index, tuple(starts), own
        else:
            yield row, number, expert, tuple(starts), one


def is_stacked(row: str) -> bool:
    """Whether all experts of a layer lie along a dimension of such entries."""
    return bool(_STACKED.search(row))


def belongs_to_experts(row: str) -> bool:
    """Whether only layers with experts have this row."""
    return bool(_OF_EXPERTS.search(row)) and "norm" not in row


def is_dense(row: str) -> bool:
    """Whether only layers without experts have this row."""
    return ".mlp." in row and "norm" not in row and not belongs_to_experts(row)


def numbers(values: Iterable[int]) -> str:
    """Numbers in words: ``0 to 3, 7``."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][-1] + 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    joints = (" to " if len(run) > 1 and run[1] > run[0] + 1 else ", " for run in runs)
    return ", ".join(joint.join(map(str, run)) for joint, run in zip(joints, runs, strict=True))


def failure(name: str, error: Exception, then: str = "", file: str = "") -> Check:
    """The failed check that an error makes of a checkpoint that is not as it should be.

    Args:
        then: added to its message.
        file: named if the message does not.
    """
    said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return Check(name, FAILED, f"{'' if file in said else f'{file}: '}{said}{then}", RESTORE)


def unread(file: str, error: Exception) -> Check:
    """The failed check of a part that cannot be read."""
    return failure("files", error, file=file)


RESTORE = "restore it from a copy, take another iteration (--ckpt-step N), or convert it again"
