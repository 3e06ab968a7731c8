"""Plants faults into Megatron's distributed checkpoints, whose manifests then fit again."""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.conversion.megatron.checkpoint import MegatronCheckpoint
from megatron_dynmoe.storage.manifest import MANIFEST, write_manifest
from megatron_dynmoe.storage.unpickle import StoredTensor, Unknown


def edit(folder: Path, key: str, change: Callable[[Tensor], Any]) -> None:
    """Change a whole entry in place; its parts are written anew, cut as they were."""
    whole = read(folder, key)
    change(whole)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    sizes = {tuple(c.offsets): c.sizes for c in metadata.state_dict_metadata[key].chunks}
    for index, info in metadata.storage_data.items():
        if index.fqn == key:
            place = zip(index.offset, sizes[tuple(index.offset)], strict=True)
            part = whole[tuple(slice(start, start + size) for start, size in place)]
            saved = io.BytesIO()
            torch.save(part.clone(), saved)
            path = folder / info.relative_path
            info.offset, info.length = path.stat().st_size, len(saved.getvalue())
            with path.open("ab") as file:
                file.write(saved.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    _seal(folder)


def read(folder: Path, key: str) -> Tensor:
    """A whole entry."""
    return MegatronCheckpoint(folder).read(key)


def drop(folder: Path, key: str, offsets: tuple[int, ...] = ()) -> None:
    """Take out the parts of an entry that begin there, or all of it."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata[key]
    entry.chunks = [c for c in entry.chunks if tuple(c.offsets)[: len(offsets)] != offsets]
    metadata.storage_data = {
        index: info
        for index, info in metadata.storage_data.items()
        if index.fqn != key or tuple(index.offset)[: len(offsets)] != offsets
    }
    if not entry.chunks:
        del metadata.state_dict_metadata[key]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    _seal(folder)


def change_common(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a checkpoint holds besides tensors, in the older place for it."""
    common = _plain(MegatronCheckpoint(folder).common)
    change(common)
    torch.save(common, folder / "common.pt")
    _seal(folder)


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return Namespace(**_plain(vars(value)))
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not _is_unknown(v)}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value if not _is_unknown(item))
    return value.read() if isinstance(value, StoredTensor) else value


def _is_unknown(value: Any) -> bool:
    return isinstance(value, Unknown) and not isinstance(value, StoredTensor)


def _seal(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder)
