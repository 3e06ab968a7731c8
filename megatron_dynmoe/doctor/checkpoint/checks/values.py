"""Checks of the values of every part: not finite, constant, or a copy of another part's."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dynmoe.conversion import routing_settings
from megatron_dynmoe.data.finding import FAILED, Check
from megatron_dynmoe.doctor.checkpoint.reading.parts import MASTER, MOMENT, WEIGHT, Part, numbers

Place = tuple[int | None, int | None]  # layer and expert

_NOT_FINITE = "the run had gone wrong, or the file was changed: take an earlier iteration"
_CONSTANT = "it was not trained: take another iteration, or convert again from the source"
_REPLICAS = "the ranks' files are not of one save: restore them, or take another iteration"
_MASTER = "weights and optimizer are not of one step: take another iteration, or --no-load-optim"
_SHOWN_FILES = 2
# The state of a router, one number or several; the rest of what it keeps is a parameter.
STATE = tuple(f".mlp.router.{name}" for name in routing_settings.STATE)


class _Fault(NamedTuple):
    """What is wrong with a part, and what to do about it."""

    what: str
    row: str
    remedy: str


class Block:
    """What is known of a tensor of one layer and expert.

    Attributes:
        files: those that hold a part of it.
        digests: of its parts, by their places; equal for equal numbers.
    """

    __slots__ = ("digests", "files")

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.digests: dict[tuple[int, ...], bytes] = {}

    @property
    def signature(self) -> tuple[tuple[tuple[int, ...], bytes], ...] | None:
        """Equal for two blocks with the same numbers; None if they say nothing, being constant."""
        return tuple(sorted(self.digests.items())) or None


class Values:
    """Takes in every part of a checkpoint and keeps what is said of it, but not the numbers.

    Attributes:
        blocks: by kind and row, then by layer and expert.
        matrices: rows whose tensors have two dimensions or more.
        scalars: values of the routers' state, by name and layer; if a name has several, as
            ``knot_thresholds[0]`` and so on.
        num_parts, num_bytes: how much was looked at.
        num_moments, num_moving: parts of the optimizer's moments, and those that are not all 0.
    """

    def __init__(self, norms_around_zero: bool) -> None:
        """Start.

        Args:
            norms_around_zero: whether the weight of a norm is an offset to 1, so that it may be 0.
        """
        self.blocks: dict[tuple[str, str], dict[Place, Block]] = defaultdict(dict)
        self.matrices: set[str] = set()
        self.scalars: dict[str, dict[int, float]] = defaultdict(dict)
        self.num_parts = self.num_bytes = self.num_moments = self.num_moving = 0
        self._norms_around_zero = norms_around_zero
        self._faults: dict[_Fault, list[tuple[Place, str]]] = defaultdict(list)

    def add(self, part: Part, weight_dtype: torch.dtype | None) -> None:
        """Look at one part.

        Args:
            weight_dtype: of the parameter of this row, to which the optimizer's copy is rounded.
        """
        tensor = part.tensor
        self.num_parts += 1
        self.num_bytes += tensor.nbytes
        blocks = self.blocks[part.kind, part.row]
        block = blocks.setdefault((part.layer, part.expert), Block())
        block.files.add(part.file)
        if tensor.dim() > 1:
            self.matrices.add(part.row)
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return
        low, high = (value.item() for value in tensor.aminmax())
        if part.kind == WEIGHT and part.row.endswith(STATE):
            name, values = part.row.rpartition(".")[2], tensor.flatten().tolist()
            for place, value in enumerate(values):
                shown = name if len(values) == 1 else f"{name}[{place}]"
                self.scalars[shown][part.layer or 0] = value
            return
        is_constant = low == high
        if not (math.isfinite(low) and math.isfinite(high)):
            self._fault(part, _not_finite(tensor), _NOT_FINITE)
        elif part.kind == MOMENT:
            if "exp_avg" in part.row:
                self.num_moments += 1
                self.num_moving += low != 0 or high != 0
            if low < 0 and "exp_avg_sq" in part.row:
                self._fault(part, f"has negative squares, down to {low:g}", _NOT_FINITE)
        elif is_constant and not self._may_be_constant(part.row, tensor, low):
            kind = "the optimizer's copy " if part.kind == MASTER else ""
            self._fault(part, f"{kind}is {'all zero' if low == 0 else f'all {low:g}'}", _CONSTANT)
            return
        if part.kind == WEIGHT or (part.kind == MASTER and weight_dtype is not None):
            self._remember(part, block, tensor if part.kind == WEIGHT else tensor.to(weight_dtype))
        elif part.kind == MOMENT and part.layer is not None and not is_constant:
            self._remember(part, block, tensor)

    def checks(self) -> Iterator[Check]:
        """What was found, the same fault of many layers and experts in one line."""
        self._compare_masters()
        for fault, places in self._faults.items():
            files = files_in_words(file for _, file in places)
            found = f"{fault.row}{_name_places(places)} {fault.what} ({files})"
            yield Check("values", FAILED, found, fault.remedy)

    def _remember(self, part: Part, block: Block, tensor: Tensor) -> None:
        if part.tensor.numel() == 1:
            return
        digest = _digest(tensor)
        known = block.digests.setdefault(part.place, digest)
        if known != digest:
            what = f"differs between {' and '.join(sorted(block.files))}"
            self._fault(part, what, _REPLICAS)

    def _compare_masters(self) -> None:
        """The optimizer's own copy of each weight, rounded, is that weight."""
        for (kind, row), blocks in self.blocks.items():
            for place, block in blocks.items() if kind == MASTER else ():
                weight = self.blocks.get((WEIGHT, row), {}).get(place)
                if weight is None or weight.digests.keys() != block.digests.keys():
                    continue  # cut in another way
                if weight.digests != block.digests:
                    fault = _Fault("is not the optimizer's own copy of it", row, _MASTER)
                    self._faults[fault] += [(place, file) for file in sorted(block.files)]

    def _may_be_constant(self, row: str, tensor: Tensor, value: float) -> bool:
        """Biases may; norms begin as ones, or as zeros if they are offsets to 1."""
        if tensor.numel() == 1 or "bias" in row:
            return True
        if tensor.dim() < 2:
            return value != 0 or self._norms_around_zero
        return False

    def _fault(self, part: Part, what: str, remedy: str) -> None:
        place = part.layer, part.expert
        self._faults[_Fault(what, part.row, remedy)].append((place, part.file))


def _not_finite(tensor: Tensor) -> str:
    """Which of both kinds there are, but not how many, which would differ in every layer."""
    kinds = [("NaN", tensor.isnan().any()), ("infinite numbers", tensor.isinf().any())]
    return f"holds {' and '.join(name for name, there in kinds if there)}"


def _digest(tensor: Tensor) -> bytes:
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(memoryview(data.numpy())).digest()


def _name_places(places: list[tuple[Place, str]]) -> str:
    """The layers and experts in words."""
    layers = {layer for (layer, _), _ in places if layer is not None}
    experts = {expert for (_, expert), _ in places if expert is not None}
    words = f" of layer{'s' * (len(layers) > 1)} {numbers(layers)}" if layers else ""
    return words + (f", expert{'s' * (len(experts) > 1)} {numbers(experts)}" if experts else "")


def files_in_words(files: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = sorted(set(files))
    rest = len(names) - _SHOWN_FILES
    shown = ", ".join(names[:_SHOWN_FILES])
    return shown if rest <= 0 else f"{shown} and {rest} more"
