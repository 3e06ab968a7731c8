"""Reads the pickles inside Megatron's distributed checkpoints without running what is in them.

A pickle may name any function and have it called, and may set attributes of any class. Here a name
is looked up in a short list; what is not on it is refused (metadata) or becomes an inert
:class:`Unknown` (the saved arguments, which hold enumerations of Megatron and of whatever else a
run had in its arguments). What is on it is handed out as a stand-in that makes such objects, so
that a pickle cannot change the class itself.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

_METADATA_CLASSES = {
    (cls.__module__, cls.__name__): cls
    for cls in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
        collections.OrderedDict,
    )
}
_OBJECT_CLASSES = {
    (cls.__module__, cls.__name__): cls for cls in (collections.OrderedDict, argparse.Namespace)
}
# Part of some metadata, and of no use here: the layout, and where the checkpoint was saved.
_UNUSED_IN_METADATA = {
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class Unknown:
    """Stands for an object of a class that is not reconstructed; nothing of it is kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Forget what it was made from."""

    def __call__(self, *args: Any) -> Unknown:
        """Do nothing, where a pickle calls what it has made."""
        return self

    def __setstate__(self, state: Any) -> None:
        """Forget what it held."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget an entry of a mapping."""

    def append(self, item: Any) -> None:
        """Forget an item of a sequence."""

    extend = append


def load_metadata(path: Path) -> metadata.Metadata:
    """The ``.metadata`` of a torch distributed checkpoint, every field of the type it should have.

    Raises:
        ValueError: the file is damaged, or names anything but the classes of such metadata.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _METADATA_CLASSES:
                return _stand_in(_METADATA_CLASSES[module, name])
            if (module, name) in _UNUSED_IN_METADATA:
                return _unknown(module, name)
            dtype = _torch_dtype(module, name)
            if dtype is None:
                raise ValueError(
                    f"it asks for {module}.{name}, which no such metadata needs; nothing was run"
                )
            return dtype

    def load() -> metadata.Metadata:
        loaded = Unpickler(io.BytesIO(path.read_bytes())).load()
        _check_metadata(loaded)
        return loaded

    return _guarded(path, load)


def load_objects(source: Path, data: bytes) -> Any:
    """What ``torch.save`` wrote, with everything but plain values inert.

    Args:
        source: the file that ``data`` comes from, for messages.

    Raises:
        ValueError: the data is damaged.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _OBJECT_CLASSES:
                return _stand_in(_OBJECT_CLASSES[module, name])
            return _torch_dtype(module, name) or _unknown(module, name)

        def persistent_load(self, pid: Any) -> Any:
            return Unknown()  # the bytes of a tensor

    def load() -> Any:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ValueError(f"it holds {len(names)} pickles")
            if archive.getinfo(names[0]).file_size > len(data):  # torch.save does not compress
                raise ValueError(f"{names[0]} is larger than the file")
            return Unpickler(io.BytesIO(archive.read(names[0]))).load()

    return _guarded(source, load)


def _stand_in(cls: type) -> type:
    """A class of its own whose instances are those of ``cls``."""

    def make(_: type, *args: Any) -> Any:
        # Pickles make a dataclass first and set its fields afterwards.
        return cls.__new__(cls) if dataclasses.is_dataclass(cls) else cls(*args)

    return type(cls.__name__, (), {"__new__": make})


def _unknown(module: str, name: str) -> type:
    return type(name, (Unknown,), {"__module__": module})


def _torch_dtype(module: str, name: str) -> torch.dtype | None:
    found = getattr(torch, name, None) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _check_metadata(loaded: Any) -> None:
    _require(loaded, metadata.Metadata)
    _require(loaded.state_dict_metadata, dict)
    _require(loaded.storage_data, dict)
    for index, info in loaded.storage_data.items():
        _require(index, metadata.MetadataIndex)
        _require(info, filesystem._StorageInfo)
        _require(info.relative_path, str)
        _require_sizes([info.offset, info.length])
    for key, entry in loaded.state_dict_metadata.items():
        _require(key, str)
        if isinstance(entry, metadata.BytesStorageMetadata):
            continue
        _require(entry, metadata.TensorStorageMetadata)
        _require(entry.properties, metadata.TensorProperties)
        _require(entry.properties.dtype, torch.dtype)
        _require(entry.size, torch.Size)
        _require_sizes(entry.size)
        _require(entry.chunks, list)
        for chunk in entry.chunks:
            _require(chunk, metadata.ChunkStorageMetadata)
            for sizes in (chunk.offsets, chunk.sizes):
                _require(sizes, torch.Size)
                _require_sizes(sizes)
                if len(sizes) != len(entry.size):
                    raise ValueError(f"a part of {key} has other dimensions than the whole")


def _require(value: Any, cls: type) -> None:
    if not isinstance(value, cls):
        raise ValueError(f"a {type(value).__name__} is where a {cls.__name__} should be")


def _require_sizes(values: Any) -> None:
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError(f"sizes should not be {list(values)}")


def _guarded(path: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # whatever bytes can make of an unpickler
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
