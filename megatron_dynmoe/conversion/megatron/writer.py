"""Writes Megatron's distributed checkpoints (``torch_dist``) in one process."""

from __future__ import annotations

import io
import json
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_dynmoe.conversion.megatron.checkpoint import COMMON_STATE
from megatron_dynmoe.conversion.names import in_halves
from megatron_dynmoe.conversion.shapes import Block
from megatron_dynmoe.storage.manifest import write_manifest
from megatron_dynmoe.storage.megatron_names import RELEASE, TRACKER

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


class MegatronWriter:
    """Collects the entries of a checkpoint; :meth:`write` then produces them one by one."""

    def __init__(
        self, num_layers: int, num_experts: int, layers_alike: bool, has_pattern: bool = False
    ) -> None:
        """Start an empty checkpoint.

        Args:
            layers_alike: whether layers lie along a leading dimension, as in Megatron if all layers
                are alike; otherwise each layer has keys of its own.
            has_pattern: whether it is for a ``HybridModel``, whose layers are never alike.
        """
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._alike = layers_alike and not has_pattern
        self._has_pattern = has_pattern
        self._items: list[WriteItem] = []
        self._makers: dict[MetadataIndex, Callable[[], Tensor | io.BytesIO]] = {}

    def add(
        self, block: Block, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> None:
        """Add a block, which ``make`` produces when its turn comes."""
        for template in block.row.keys:
            key, layer = template, block.layer
            if self._has_pattern:
                key, layer = in_halves(template, layer)
            lead: tuple[int, ...] = ()
            sizes: tuple[int, ...] = ()
            if layer is not None and self._alike:
                key = key.replace("{layer}.", "")
                lead, sizes = (layer,), (self._num_layers,)
            key = key.format(layer=layer)
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
            args: the arguments of the run, as Megatron will read them; plain values only.
        """
        folder = save / RELEASE
        folder.mkdir(parents=True)
        common = {
            "args": Namespace(**args),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {"singleton_local_shards": False},
        }
        self._add_object(COMMON_STATE, [common])
        writer = _Writer(folder)
        writer.set_up_storage_writer(is_coordinator=True)
        (plan,), metadata = create_default_global_save_plan([SavePlan(self._items)])
        assert isinstance(metadata.state_dict_metadata[COMMON_STATE], BytesStorageMetadata)
        plan = writer.prepare_local_plan(plan)
        (plan,) = writer.prepare_global_plan([plan])
        try:
            results = writer.write_data(plan, self).wait()  # type: ignore[arg-type]
        except RuntimeError as error:  # how torch.save says that the disk is full
            raise OSError(str(error)) from error
        writer.finish(metadata, [results])
        (folder / "metadata.json").write_text(json.dumps(_FORMAT))
        write_manifest(folder)
        (save / TRACKER).write_text(RELEASE)

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        """A plan for torch's writer, which asks for one item after the other."""
        return self._makers[item.index]()


class _Writer(FileSystemWriter):
    """Torch's writer, without the path that it notes: the folder is renamed afterwards."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)
