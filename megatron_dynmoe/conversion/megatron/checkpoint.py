"""Reads Megatron's distributed checkpoints (``torch_dist``) in one process.

This needs no process group, no Megatron and no GPU. torch's own reader of distributed checkpoints
does the work, one block at a time, so a checkpoint may be larger than memory.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dynmoe.conversion.names import MEGATRON, rows_by_part
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.storage.manifest import plain_name
from megatron_dynmoe.storage.megatron_names import TRACKER, checkpoint_name, read_tracker
from megatron_dynmoe.storage.unpickle import load_metadata, load_objects

COMMON_STATE = "common_state/shard_0_1"
# Entries that are not part of the model.
_NOT_THE_MODEL = re.compile(
    r"(chained_\d+\.)?optimizer\b|rng_state|rerun_state_machine|common_state|.*\._extra_state/"
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


class StoredPart(NamedTuple):
    """A part of an entry as one rank has written it.

    Attributes:
        key: of the entry.
        file: the name of the file that holds the part.
        offsets, sizes: where in the entry it lies, and its shape.
    """

    key: str
    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class MegatronCheckpoint:
    """One checkpoint, of any layout, opened for reading.

    Attributes:
        folder: ``.../iter_0000100`` or ``.../release``.
        iteration: the number of finished steps; 0 for a converted one.
        args: Megatron's arguments of the run that saved it.
        common: what it holds besides tensors, the arguments among it.
    """

    def __init__(self, load: Path, iteration: int | None = None) -> None:
        """Open a checkpoint.

        Args:
            load: the folder for ``--load``, which has ``latest_checkpointed_iteration.txt``.
            iteration: the checkpoint's iteration; the latest if None.

        Raises:
            ValueError: there is no checkpoint, or it is of another format, incomplete or damaged.
        """
        self.folder = checkpoint_folder(load, iteration)
        metadata_path = self.folder / ".metadata"
        if not metadata_path.exists():
            raise ValueError(
                f"{self.folder} holds no .metadata: only Megatron's torch_dist checkpoints can be "
                "read (--ckpt-format torch_dist, its default); resume with it and save once"
            )
        metadata = load_metadata(metadata_path)
        self._entries = metadata.state_dict_metadata
        self._storage: dict[Any, Any] = metadata.storage_data
        self._check_files()
        self._check_lengths()
        self._reader = FileSystemReader(self.folder)
        self._checked: set[tuple[str, int]] = set()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.common = self._common()
        self.iteration: int = self.common.get("iteration", 0)
        self.args: Namespace = self.common["args"]

    @property
    def num_layers(self) -> int:
        """The number of layers that the weights have, which the arguments need not agree with."""
        stacked = rows_by_part(MEGATRON)["o"].key.replace("{layer}.", "")
        if stacked in self._entries:
            return next(iter(self.shape(stacked)), 0)
        return len({match[1] for match in map(_LAYER.match, self._entries) if match})

    @property
    def model_keys(self) -> set[str]:
        """The keys of all entries that belong to the model."""
        return {key for key in self._entries if not _NOT_THE_MODEL.match(key)}

    def find(self, row_keys: Iterable[str], layer: int | None) -> tuple[str, tuple[int, ...]]:
        """The first of these keys that exists, and the leading indices that select the layer.

        Raises:
            ValueError: none of them exists.
        """
        tried = []
        index_of_layer: tuple[int, ...] = () if layer is None else (layer,)
        for template in row_keys:
            stacked = template.replace("{layer}.", "")
            for key, index in ((stacked, index_of_layer), (template.format(layer=layer), ())):
                if key in self._entries:
                    return key, index
                tried.append(key)
        raise ValueError(f"{self.folder} has no entry {' or '.join(dict.fromkeys(tried))}")

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a whole entry."""
        return tuple(self._tensor_entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """The type of an entry."""
        return self._tensor_entry(key).properties.dtype

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """A part of an entry: ``index`` fixes its leading dimensions, which the result lacks.

        Raises:
            ValueError: the entry does not cover that part, or its file is damaged.
        """
        entry = self._tensor_entry(key)
        offsets = (*index, *(0 for _ in entry.size[len(index) :]))
        sizes = (*(1 for _ in index), *entry.size[len(index) :])
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        if not _tile(items, torch.Size(sizes).numel()):
            raise ValueError(f"{self.folder}: the stored parts of {key} do not cover {index}")
        return self._read_items(key, items, sizes).reshape(sizes[len(index) :])

    def _read_items(self, key: str, items: list[ReadItem], sizes: tuple[int, ...]) -> Tensor:
        for item in items:
            self._check_sum(key, self._storage[item.storage_index])
        target = torch.empty(sizes, dtype=self.dtype(key))
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))  # type: ignore[arg-type]
        except Exception as error:
            files = sorted({self._storage[item.storage_index].relative_path for item in items})
            raise ValueError(
                f"{self.folder / files[0]}: {key} cannot be read ({error}); the file is damaged"
            ) from error
        return target

    def parts(self) -> Iterator[StoredPart]:
        """Every stored part of every tensor, in the order of the files."""
        stored = (
            (info.relative_path, info.offset, key, chunk)
            for key, entry in self._entries.items()
            if isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks
            if (info := self._storage.get(MetadataIndex(key, chunk.offsets))) is not None
        )
        for file, _, key, chunk in sorted(stored, key=lambda place: place[:2]):
            yield StoredPart(key, file, tuple(chunk.offsets), tuple(chunk.sizes))

    def read_part(self, part: StoredPart) -> Tensor:
        """One stored part, of its own shape.

        Raises:
            ValueError: its file is damaged.
        """
        start, lengths = torch.Size(part.offsets), torch.Size(part.sizes)
        self._check_length(part.key, start, lengths)
        zeros, index = torch.Size([0] * len(lengths)), MetadataIndex(part.key, start)
        item = ReadItem(LoadItemType.TENSOR, index, zeros, index, zeros, lengths)
        return self._read_items(part.key, [item], part.sizes)

    def _check_sum(self, key: str, info: Any) -> None:
        """Compare a record with its CRC-32, which torch writes but does not check."""
        if (info.relative_path, info.offset) in self._checked:
            return
        path = self.folder / info.relative_path
        with path.open("rb") as file:
            file.seek(info.offset)
            record = io.BytesIO(file.read(info.length))
        try:
            with zipfile.ZipFile(record) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
                damaged = archive.testzip() if unpacked <= info.length else "too large"
        except (zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
            damaged = str(error)
        if damaged == "too large":  # torch does not compress
            raise ValueError(
                f"{path}: {key} has {info.length} bytes, which would become {unpacked}: it is no "
                "tensor that torch has saved"
            )
        if damaged is not None:
            raise ValueError(f"{path}: {key} does not have its checksum: the file is damaged")
        self._checked.add((info.relative_path, info.offset))

    def _tensor_entry(self, key: str) -> TensorStorageMetadata:
        entry = self._entries[key]
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{self.folder}: {key} is not a tensor")
        return entry

    def _check_files(self) -> None:
        """Before reading a file, refuse files that are missing, cut short or outside the folder."""
        ends: dict[str, int] = {}
        for info in self._storage.values():
            name = plain_name(info.relative_path, self.folder / ".metadata")
            ends[name] = max(ends.get(name, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing: the checkpoint is incomplete")
            if path.stat().st_size < end:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes of at least {end}: it is cut short"
                )

    def _check_lengths(self) -> None:
        """Before allocating memory, refuse tensors that are declared larger than what is stored."""
        for key in self.model_keys:
            entry = self._entries[key]
            if not isinstance(entry, TensorStorageMetadata):
                continue
            for chunk in entry.chunks:
                self._check_length(key, chunk.offsets, chunk.sizes)

    def _check_length(self, key: str, offsets: torch.Size, sizes: torch.Size) -> None:
        info = self._storage.get(MetadataIndex(key, offsets))
        size = math.prod(sizes) * self.dtype(key).itemsize
        if info is None or info.length < size:
            raise ValueError(
                f"{self.folder}/.metadata gives {key} a part of {size} bytes, of which "
                f"{0 if info is None else info.length} are stored: it is damaged"
            )

    @property
    def tensors(self) -> list[str]:
        """The keys of all entries that are tensors."""
        return [
            key for key, entry in self._entries.items() if isinstance(entry, TensorStorageMetadata)
        ]

    @property
    def objects(self) -> list[str]:
        """The keys of all entries that are not tensors."""
        return [
            key
            for key, entry in self._entries.items()
            if not isinstance(entry, TensorStorageMetadata)
        ]

    def read_object(self, key: str) -> Any:
        """An entry that is not a tensor; None if there is no such entry.

        Raises:
            ValueError: its file is damaged.
        """
        info = self._storage.get(MetadataIndex(key))
        if info is None:
            return None
        path = self.folder / info.relative_path
        with path.open("rb") as file:
            file.seek(info.offset)
            loaded = load_objects(path, file.read(info.length))
        return loaded[0] if isinstance(loaded, list) and loaded else loaded

    def _common(self) -> dict[str, Any]:
        """The objects that Megatron saves besides tensors; before 0.19 in a file of its own."""
        legacy = self.folder / "common.pt"
        common = load_objects(legacy) if legacy.is_file() else self.read_object(COMMON_STATE)
        if (
            not isinstance(common, dict)
            or not isinstance(common.get("args"), Namespace)
            or not isinstance(common.get("iteration", 0), int)
        ):
            raise ValueError(
                f"{self.folder} holds no arguments of the run that saved it, which say what the "
                "model is: save it with Megatron's own training loop"
            )
        return common


def checkpoint_folder(load: Path, iteration: int | None) -> Path:
    """The folder of one checkpoint, ``iter_...`` or ``release``; arguments as above.

    Raises:
        UsageError: there is no such folder, or it holds no such checkpoint.
        ValueError: the tracker is damaged.
    """
    tracker = load / TRACKER
    if (load / ".metadata").exists() and iteration is None:
        return load  # a checkpoint itself, not the folder of a run
    if not load.is_dir():
        raise UsageError(f"--load is {load}: there is no such folder")
    if iteration is None:
        if not tracker.is_file():
            raise UsageError(
                f"--load is {load}, which holds no {TRACKER}: name the folder that a run saved to "
                "(its --save, or checkpoints in its --run-dir)"
            )
        name = checkpoint_name(read_tracker(tracker))
    else:
        name = checkpoint_name(iteration)
    folder = load / name
    if not folder.is_dir():
        there = sorted(path.name for path in load.glob("iter_*")) or ["none"]
        kind = ValueError if iteration is None else UsageError  # a damaged tracker is no misuse
        raise kind(f"{folder} does not exist; the iterations there: {', '.join(there)}")
    return folder


class _Into:
    """A load planner that puts everything into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, item: Any) -> Tensor:
        ranges = zip(item.dest_offsets, item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in ranges)]

    def commit_tensor(self, item: Any, tensor: Tensor) -> None:
        """Do nothing, because the tensor is a view of the target."""


def _tile(items: list[ReadItem], num_elements: int) -> bool:
    """Whether boxes hold as many elements as their target, and no element twice."""
    boxes = [tuple(zip(item.dest_offsets, item.lengths, strict=True)) for item in items]
    apart = all(
        any(a + n <= b or b + m <= a for (a, n), (b, m) in zip(one, other, strict=True))
        for one, other in itertools.combinations(boxes, 2)
    )
    return apart and sum(math.prod(item.lengths) for item in items) == num_elements
