"""Reads the pickles inside Megatron's distributed checkpoints without running what is in them.

A pickle may name any function and have it called, and may set attributes of any class. Here a name
is looked up in a short list; what is not on it is refused (metadata) or becomes an inert
:class:`Unknown` (the saved arguments, which hold enumerations of Megatron and of whatever else a
run had in its arguments). What is on it is handed out as a stand-in that makes such objects, so
that a pickle cannot change the class itself. A tensor becomes a :class:`StoredTensor`, which knows
where its numbers lie and reads them when it is asked to.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
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
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
# How a file of torch.save names the types of its numbers.
_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in (
        *(("Double", torch.float64), ("Float", torch.float32), ("Half", torch.float16)),
        *(("BFloat16", torch.bfloat16), ("Bool", torch.bool), ("Byte", torch.uint8)),
        *(("Char", torch.int8), ("Short", torch.int16), ("Int", torch.int32)),
        ("Long", torch.int64),
    )
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
        """Do nothing if a pickle calls what it has made."""
        return self

    def __setstate__(self, state: Any) -> None:
        """Forget what it held."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget an entry of a mapping."""

    def append(self, item: Any) -> None:
        """Forget an item of a sequence."""

    extend = append


class _Record(NamedTuple):
    """Where the numbers of some tensors lie: a member of the archive, and their type."""

    archive: Path | bytes
    name: str
    dtype: torch.dtype


class StoredTensor(Unknown):
    """A tensor in a file of ``torch.save``, of which nothing has been read yet.

    Attributes:
        shape, dtype: of the tensor.
    """

    def __init__(
        self, record: _Record, offset: int, shape: Any, strides: Any, *_unused: Any
    ) -> None:
        """Note where it lies; ``offset`` and ``strides`` count elements."""
        _require_sizes([offset, *shape, *strides])
        self.shape, self.dtype = tuple(shape), record.dtype
        self._record, self._offset, self._strides = record, offset, tuple(strides)

    def read(self, archive: zipfile.ZipFile | None = None) -> Tensor:
        """The tensor itself; nothing but its own numbers is read.

        Args:
            archive: its file if that is open already.

        Raises:
            ValueError: the file does not hold as many numbers as it declares.
        """
        if archive is None:
            source = self._record.archive
            with zipfile.ZipFile(source if isinstance(source, Path) else io.BytesIO(source)) as own:
                return self.read(own)
        steps = zip(self.shape, self._strides, strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in steps) if self.numel else 0
        record, width = self._record, self.dtype.itemsize
        if not self.numel <= extent <= 2 * self.numel:  # one number repeated, or few far apart
            raise ValueError(f"{record.name} has strides {self._strides}, which no training saves")
        if record.name not in archive.NameToInfo:
            raise ValueError(f"{record.name} is missing")
        member = archive.getinfo(record.name)
        if member.compress_type != zipfile.ZIP_STORED:  # torch does not compress
            raise ValueError(f"{record.name} is compressed")
        if (self._offset + extent) * width > member.file_size:
            raise ValueError(f"{record.name} is declared larger than what is stored")
        try:
            with archive.open(member) as file:
                file.seek(self._offset * width)
                content = bytearray(file.read(extent * width))
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{record.name} is damaged: {error}") from error
        if not content:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(content, dtype=self.dtype).as_strided(self.shape, self._strides)

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


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


def load_objects(source: Path, data: bytes | None = None) -> Any:
    """What ``torch.save`` wrote, with everything but plain values inert, tensors unread.

    Args:
        source: the file, for messages too.
        data: the bytes to read if they are only a part of the file.

    Raises:
        ValueError: the data is damaged.
    """
    place: Path | bytes = source if data is None else data

    class Unpickler(pickle.Unpickler):
        records: str  # what the names of the members begin with

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _OBJECT_CLASSES:
                return _stand_in(_OBJECT_CLASSES[module, name])
            if (module, name) == _TENSOR:
                return type(name, (), {"__new__": _tensor})
            if module == "torch" and name in _STORAGES:
                return _STORAGES[name]
            return _torch_dtype(module, name) or _unknown(module, name)

        def persistent_load(self, pid: Any) -> Any:
            kind, dtype, key = pid[:3]
            if kind != "storage" or not isinstance(dtype, torch.dtype):
                return Unknown()  # numbers of another type
            return _Record(place, f"{self.records}data/{key}", dtype)

    def load() -> Any:
        with zipfile.ZipFile(source if data is None else io.BytesIO(data)) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ValueError(f"it holds {len(names)} pickles")
            size = source.stat().st_size if data is None else len(data)
            if archive.getinfo(names[0]).file_size > size:  # torch.save does not compress
                raise ValueError(f"{names[0]} is larger than the file")
            unpickler = Unpickler(io.BytesIO(archive.read(names[0])))
            unpickler.records = names[0].removesuffix("data.pkl")
            return unpickler.load()

    return _guarded(source, load)


def _tensor(_: type, record: Any, *args: Any) -> Unknown:
    return StoredTensor(record, *args) if isinstance(record, _Record) else Unknown()


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
