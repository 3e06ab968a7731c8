"""Reads the pickles inside Megatron's distributed checkpoints without running what is in them.

A pickle may name any function and have it called. Here a name is looked up in a short list; what
is not on it is refused (metadata) or becomes an inert :class:`Unknown` (the saved arguments, which
hold enumerations of Megatron and of whatever else a run had in its arguments).
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
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
} | {
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Where the checkpoint was saved, which some writers note as a path.
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
}
_TENSOR_PARTS = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
}


class Unknown:
    """Stands for an object of a class that is not reconstructed; keeps what it was made from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.made_from = (args, kwargs)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """A mapping's entry, which nobody needs."""

    def append(self, item: Any) -> None:
        """A sequence's entry, which nobody needs."""

    extend = append


def load_metadata(path: Path) -> metadata.Metadata:
    """The ``.metadata`` of a torch distributed checkpoint.

    Raises:
        ValueError: the file is damaged, or names anything but the classes of such metadata.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = _METADATA_CLASSES.get((module, name)) or _torch_dtype(module, name)
            if found is None:
                raise ValueError(
                    f"{path} asks for {module}.{name}, which the metadata of a checkpoint never "
                    "needs: it is damaged or hostile, and nothing of it was run"
                )
            return found

    loaded = _guarded(path, lambda: Unpickler(io.BytesIO(path.read_bytes())).load())
    if not isinstance(loaded, metadata.Metadata):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a checkpoint's metadata")
    return loaded


def load_objects(source: Path, data: bytes) -> Any:
    """What ``torch.save`` wrote, with everything but plain values and tensors inert.

    Args:
        source: the file that ``data`` comes from, for messages.

    Raises:
        ValueError: the data is damaged.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = _TENSOR_PARTS.get((module, name)) or _torch_dtype(module, name)
            return found or type(name, (Unknown,), {"__module__": module})

    if zipfile.is_zipfile(io.BytesIO(data)):
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        if any(name.endswith("constants.pkl") for name in names):
            raise ValueError(f"{source} holds TorchScript, which is code, instead of values")
    # torch.load takes the two names that it needs from whatever stands for the pickle module.
    restricted = SimpleNamespace(
        __name__="restricted", Unpickler=Unpickler, UnpicklingError=pickle.UnpicklingError
    )
    return _guarded(
        source,
        lambda: torch.load(
            io.BytesIO(data), map_location="cpu", pickle_module=restricted, weights_only=False
        ),
    )


def _torch_dtype(module: str, name: str) -> torch.dtype | None:
    found = getattr(torch, name, None) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _guarded(path: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ValueError:
        raise
    except Exception as error:  # whatever bytes can make of an unpickler
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
