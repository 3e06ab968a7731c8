"""Reads Megatron's checkpoints of the format ``torch``: one file of each rank of the model."""

from __future__ import annotations

import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_dynmoe.data.finding import FAILED, Check
from megatron_dynmoe.doctor.checkpoint.reading.parts import (
    MOMENT,
    RESTORE,
    WEIGHT,
    Part,
    cut,
    place_of,
    unread,
)
from megatron_dynmoe.storage.unpickle import StoredTensor, load_objects

_RANK = re.compile(r"mp_rank_(\d+)((?:_\d+)*)")
MODEL_FILE, OPTIMIZER_FILE = "model_optim_rng.pt", "distrib_optim.pt"
# All ranks of a tensor-parallel group hold the same.
_REPLICATED = re.compile(r"norm|\.router\.|position_embeddings|gate_weight")


class _Rank(NamedTuple):
    tensor: int
    pipeline: int
    expert: int
    file: Path
    state: dict[str, Any]


class RankFiles:
    """See :class:`megatron_dynmoe.doctor.checkpoint.reading.parts.Opened`."""

    def __init__(self, folder: Path) -> None:
        """Open the folder of one iteration: reads all that is not a tensor.

        Raises:
            ValueError: no file can be read.
        """
        self.folder = folder
        self.faults: list[Check] = []
        loaded = [*self._load()]
        if not loaded:
            raise ValueError(f"{folder} has no {MODEL_FILE} of any rank that can be read")
        self.args: Namespace | None = loaded[0][1].get("args")
        if not isinstance(self.args, Namespace):
            raise ValueError(f"{loaded[0][0]} holds no arguments of the run that saved it")
        self.iteration: int | None = loaded[0][1].get("iteration")
        self._ranks = [_Rank(*self._place(file), file, state) for file, state in loaded]
        self._check_ranks()
        self._first_layers = self._number_layers()
        self.states: list[tuple[str, Any]] = [(self._short(r.file), r.state) for r in self._ranks]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("mp_rank_*/*.pt"))

    def weight_dtype(self, row: str) -> torch.dtype | None:
        return None  # the optimizer's copies have no names here

    def parts(self) -> Iterator[Part | Check]:
        for rank in self._ranks:
            yield from self._of_file(rank.file, rank.state.get("optimizer"), rank)
        for path in sorted(self.folder.glob(f"mp_rank_*/{OPTIMIZER_FILE}")):
            try:
                yield from self._of_file(path, load_objects(path), None)
            except (ValueError, OSError) as error:
                yield unread(str(path), error)

    def _of_file(self, path: Path, optimizer: Any, rank: _Rank | None) -> Iterator[Part | Check]:
        """The parts of the model in a rank's file, and its optimizer's; first whether it is whole.

        A tensor may be a view of much more, so that reading it does not read its checksum.
        """
        file = self._short(path)
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                yield unread(str(path), ValueError(f"{damaged} does not have its checksum"))
            for chunk in [] if rank is None else _chunks(rank.state):
                for name, stored in rank.state[chunk].items():  # type: ignore[union-attr]
                    if isinstance(stored, StoredTensor):
                        assert rank is not None
                        yield from self._of_model(archive, rank, chunk, name, stored)
            for name, stored in _tensors(optimizer, "optimizer"):
                try:
                    yield Part(file, name, MOMENT, None, None, (), stored.read(archive))
                except (ValueError, OSError) as error:
                    yield unread(str(path), error)

    def _load(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in sorted(self.folder.glob(f"mp_rank_*/{MODEL_FILE}")):
            try:
                state = load_objects(path)
                if not isinstance(state, dict):
                    raise ValueError(f"{path} holds no state of a rank")
                yield path, state
            except (ValueError, OSError) as error:
                self.faults.append(unread(str(path), error))

    def _place(self, file: Path) -> tuple[int, int, int]:
        """Tensor-, pipeline- and expert-parallel rank, from the folder's name."""
        found = _RANK.fullmatch(file.parent.name)
        if not found:
            raise ValueError(f"{file.parent} is no name of a rank's folder")
        rest = [int(number) for number in found[2].split("_") if number]
        pipeline = rest.pop(0) if rest and self._size("pipeline_model_parallel_size") > 1 else 0
        return int(found[1]), pipeline, rest.pop(0) if rest else 0

    def _size(self, name: str) -> int:
        value = getattr(self.args, name, None)
        return value if isinstance(value, int) else 1

    def _check_ranks(self) -> None:
        """Every rank of the layout has a file, and all of them are of one save."""
        for index, name in enumerate(("tensor", "pipeline", "expert")):
            there = {rank[index] for rank in self._ranks}
            for missing in sorted(set(range(self._size(f"{name}_model_parallel_size"))) - there):
                found = f"{self.folder}: there is no file of {name}-parallel rank {missing}"
                self.faults.append(Check("files", FAILED, found, RESTORE))
        for rank in self._ranks:
            own = rank.state.get("iteration")
            if own != self.iteration:
                found = f"{rank.file} is of iteration {own}, {self._ranks[0].file} of "
                self.faults.append(Check("files", FAILED, f"{found}{self.iteration}", RESTORE))

    def _number_layers(self) -> dict[tuple[int, str], int]:
        """The first layer of each pipeline rank's chunk of the model, whose own count from 0.

        With interleaved pipelines each rank has several chunks; the first chunks of all ranks come
        before their second ones.
        """
        counts = {}
        for rank in self._ranks:
            for chunk in _chunks(rank.state):
                layers = [place_of(name)[1] for name in rank.state[chunk]]
                last = max((number for number in layers if number is not None), default=-1)
                counts[rank.pipeline, chunk] = 1 + last
        first, starts = 0, {}
        for place in sorted(counts, key=lambda place: (len(place[1]), place[1], place[0])):
            starts[place] = first
            first += counts[place]
        return starts

    def _of_model(
        self, archive: zipfile.ZipFile, rank: _Rank, chunk: str, name: str, stored: StoredTensor
    ) -> Iterator[Part | Check]:
        of_a_rank = (getattr(self.args, "num_experts", None) or 0) // self._size(
            "expert_model_parallel_size"
        )
        first_layer = self._first_layers[rank.pipeline, chunk]
        first_expert = rank.expert * of_a_rank
        place = (rank.tensor,)
        if _REPLICATED.search(name) or (
            ".experts." in name and self._size("expert_tensor_parallel_size") == 1
        ):
            place = (0,)
        try:
            tensor = stored.read(archive)
            for row, layer, expert, _, own in cut(name, tensor, [0] * tensor.dim()):
                yield Part(
                    self._short(rank.file),
                    row,
                    WEIGHT,
                    None if layer is None else first_layer + layer,
                    None if expert is None else first_expert + expert,
                    place,
                    own,
                )
        except (ValueError, OSError) as error:
            yield unread(str(rank.file), error)

    def _short(self, file: Path) -> str:
        return f"{file.parent.name}/{file.name}"


def _tensors(state: Any, name: str) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor at any depth, under the names that lead to it."""
    if isinstance(state, StoredTensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from _tensors(value, f"{name}.{index}")


def _chunks(state: dict[str, Any]) -> list[str]:
    """The names of the parts of the model: ``model``, or ``model0`` and so on."""
    names = [name for name in state if isinstance(name, str) and re.fullmatch(r"model\d*", name)]
    return sorted((n for n in names if isinstance(state[n], dict)), key=lambda n: (len(n), n))
