"""Megatron's distributed checkpoints (``torch_dist``), read and written in one process.

No process group, no Megatron and no GPU: torch's own distributed-checkpoint reader and writer do
the work, one block at a time, so that a checkpoint larger than memory passes through.
"""

from __future__ import annotations

import io
import json
import re
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dynmoe.conversion.names import Block, Row
from megatron_dynmoe.conversion.unpickle import load_metadata, load_objects

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON_STATE = "common_state/shard_0_1"
# Entries that are not part of the model.
_NOT_THE_MODEL = re.compile(
    r"(chained_\d+\.)?optimizer\b|rng_state|rerun_state_machine|common_state|.*\._extra_state/"
)


class MegatronCheckpoint:
    """One checkpoint, of any layout, opened for reading.

    Attributes:
        folder: ``.../iter_0000100`` or ``.../release``.
        iteration: the number of finished steps; 0 for a converted one.
        args: Megatron's arguments of the run that saved it.
    """

    def __init__(self, load: Path, iteration: int | None = None) -> None:
        """Open a checkpoint.

        Args:
            load: what ``--load`` names: the folder with ``latest_checkpointed_iteration.txt``.
            iteration: which one; the latest if None.

        Raises:
            ValueError: there is none, it is of another format, incomplete or damaged.
        """
        self.folder = _folder(load, iteration)
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
        self._reader = FileSystemReader(self.folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        common = self._common()
        self.iteration = int(common.get("iteration", 0))
        self.args: Namespace = common["args"]

    @property
    def model_keys(self) -> set[str]:
        """The keys of all entries that belong to the model."""
        return {key for key in self._entries if not _NOT_THE_MODEL.match(key)}

    def find(self, row_keys: Iterable[str], layer: int | None) -> tuple[str, tuple[int, ...]]:
        """The first of some keys that exists, and the leading indices that lead to the layer.

        Raises:
            ValueError: none exists.
        """
        tried = []
        for template in row_keys:
            stacked = template.replace("{layer}.", "")
            for key, index in ((stacked, (layer,)), (template.format(layer=layer), ())):
                if key in self._entries:
                    return key, () if layer is None else index
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
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        if sum(torch.Size(item.lengths).numel() for item in items) != target.numel():
            raise ValueError(f"{self.folder}: the stored parts of {key} do not cover {index}")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))  # type: ignore[arg-type]
        except Exception as error:
            files = sorted({self._storage[item.storage_index].relative_path for item in items})
            raise ValueError(
                f"{self.folder / files[0]}: {key} cannot be read ({error}); the file is damaged"
            ) from error
        return target.reshape(sizes[len(index) :])

    def read_block(self, block: Block) -> Tensor:
        """The tensor of a row of the Megatron table in one layer and for one expert."""
        key, index = self.find((block.row.key, *block.row.aliases), block.layer)
        return self.read(key, index if block.expert is None else (*index, block.expert))

    def _tensor_entry(self, key: str) -> TensorStorageMetadata:
        entry = self._entries[key]
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{self.folder}: {key} is no tensor")
        return entry

    def _check_files(self) -> None:
        """Find a file that is missing, cut short or outside the folder before reading any."""
        ends: dict[str, int] = {}
        for info in self._storage.values():
            name = info.relative_path
            if Path(name).name != name:
                raise ValueError(f"{self.folder}/.metadata points outside its folder: {name}")
            ends[name] = max(ends.get(name, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing: the checkpoint is incomplete")
            if path.stat().st_size < end:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes of at least {end}: it is cut short"
                )

    def _common(self) -> dict[str, Any]:
        """What Megatron saves besides tensors; before 0.19 in a file of its own."""
        legacy = self.folder / "common.pt"
        info = self._storage.get(MetadataIndex(_COMMON_STATE))
        if legacy.is_file():
            common = load_objects(legacy, legacy.read_bytes())
        elif info is not None:
            path = self.folder / info.relative_path
            with path.open("rb") as file:
                file.seek(info.offset)
                loaded = load_objects(path, file.read(info.length))
            common = loaded[0] if isinstance(loaded, list) else loaded
        else:
            common = None
        if not isinstance(common, dict) or not isinstance(common.get("args"), Namespace):
            raise ValueError(
                f"{self.folder} holds no arguments of the run that saved it, which say what the "
                "model is: save it with Megatron's own training loop"
            )
        return common


class _Into:
    """A load planner that puts everything into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, item: Any) -> Tensor:
        ranges = zip(item.dest_offsets, item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in ranges)]

    def commit_tensor(self, item: Any, tensor: Tensor) -> None:
        """Nothing is left to do: the tensor is a view of the target."""


class MegatronWriter:
    """Collects what a checkpoint shall hold; :meth:`write` then produces it piece by piece."""

    def __init__(self, num_layers: int, num_experts: int, layers_alike: bool) -> None:
        """Start an empty checkpoint.

        Args:
            layers_alike: layers lie along a leading dimension, as Megatron has it where all are
                alike; else each has keys of its own.
        """
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._alike = layers_alike
        self._items: list[WriteItem] = []
        self._makers: dict[MetadataIndex, Callable[[], Tensor | io.BytesIO]] = {}

    def add(
        self, block: Block, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> None:
        """Add a block, which ``make`` produces when its turn comes."""
        for template in (block.row.key, *block.row.aliases):
            key, lead, sizes = template, (), ()
            if block.layer is not None:
                key = template.format(layer=block.layer)
                if self._alike:
                    key = template.replace("{layer}.", "")
                    lead, sizes = (block.layer,), (self._num_layers,)
            if block.expert is not None:
                lead, sizes = (*lead, block.expert), (*sizes, self._num_experts)
            self._add_tensor(key, lead, sizes, shape, dtype, make)
            if re.search(r"\.linear_\w+\.weight$", key):
                self._add_extra_state(key.removesuffix("weight"), lead, sizes)

    def _add_tensor(
        self,
        key: str,
        lead: tuple[int, ...],
        sizes: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        make: Callable[[], Tensor],
    ) -> None:
        offsets = torch.Size((*lead, *(0 for _ in shape)))
        chunk = torch.Size((*(1 for _ in lead), *shape))
        index = MetadataIndex(key, offsets)
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=chunk),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size((*sizes, *shape)),
        )
        self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self._makers[index] = lambda: make().to(dtype).reshape(chunk).contiguous()

    def _add_extra_state(self, prefix: str, lead: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        """The empty extra state without which Megatron's linear layers do not load."""
        offset, shape = ".".join(map(str, lead or [0])), ".".join(map(str, sizes or [1]))
        self._add_object(f"{prefix}_extra_state/shard_{offset}_{shape}", [None])

    def _add_object(self, key: str, content: Any) -> None:
        saved = io.BytesIO()
        torch.save(content, saved)
        index = MetadataIndex(key)
        self._items.append(WriteItem(index, WriteItemType.BYTE_IO))
        self._makers[index] = lambda: saved

    def write(self, save: Path, args: dict[str, Any]) -> None:
        """Write all of it as the release checkpoint of the folder ``save``.

        Args:
            args: what Megatron shall find as the arguments of the run; plain values only.
        """
        folder = save / RELEASE
        folder.mkdir(parents=True)
        common = {
            "args": Namespace(**args),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {"singleton_local_shards": False},
        }
        self._add_object(_COMMON_STATE, [common])
        writer = _Writer(folder)
        writer.set_up_storage_writer(is_coordinator=True)
        (plan,), metadata = create_default_global_save_plan([SavePlan(self._items)])
        assert isinstance(metadata.state_dict_metadata[_COMMON_STATE], BytesStorageMetadata)
        plan = writer.prepare_local_plan(plan)
        (plan,) = writer.prepare_global_plan([plan])
        results = writer.write_data(plan, self).wait()  # type: ignore[arg-type]
        writer.finish(metadata, [results])
        (folder / "metadata.json").write_text(json.dumps(_FORMAT))
        (save / TRACKER).write_text(RELEASE)

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        """For torch's writer, which asks for one item after the other."""
        return self._makers[item.index]()


class _Writer(FileSystemWriter):
    """Torch's writer, which would note the path of a folder that is renamed afterwards."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


def _folder(load: Path, iteration: int | None) -> Path:
    tracker = load / TRACKER
    if (load / ".metadata").exists() and iteration is None:
        return load  # a checkpoint itself, not the folder of a run
    if not load.is_dir():
        raise ValueError(f"--load is {load}: there is no such folder")
    if iteration is None:
        if not tracker.is_file():
            raise ValueError(
                f"--load is {load}, which holds no {TRACKER}: name the folder that a run saved to "
                "(its --save, or checkpoints in its --run-dir)"
            )
        latest = tracker.read_text().strip()
        if latest != RELEASE and not latest.isdigit():
            raise ValueError(f"{tracker} holds {latest[:40]!r}: not the number of an iteration")
        name = RELEASE if latest == RELEASE else f"iter_{int(latest):07d}"
    else:
        name = f"iter_{iteration:07d}"
    folder = load / name
    if not folder.is_dir():
        there = sorted(path.name for path in load.glob("iter_*")) or ["none"]
        raise ValueError(f"{folder} does not exist; the iterations there: {', '.join(there)}")
    return folder


def row_entry_keys(row: Row, layers: Iterable[int | None]) -> set[str]:
    """Every key under which the entries of a row may be found."""
    keys = set()
    for template in (row.key, *row.aliases):
        keys.add(template.replace("{layer}.", ""))
        keys.update(template.format(layer=layer) for layer in layers)
    return keys
