"""Reads and writes Hugging Face model folders; a folder is written whole or not at all."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_dynmoe.conversion.hugging_face.words import CONFIG
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.storage.atomic import current_umask
from megatron_dynmoe.storage.json_files import read_json, write_json
from megatron_dynmoe.storage.manifest import plain_name
from megatron_dynmoe.storage.megatron_names import CHECKPOINTS, TRACKER

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The dtypes of weights, under the names of safetensors and of torch.
WEIGHT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAPPED_AT_MOST = 2**28


class Entry(NamedTuple):
    """A tensor to be written; ``make`` produces it when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(
    folder: Path,
    entries: Iterable[Entry],
    max_shard_size: int,
    progress: Callable[[int], Any],
) -> None:
    """Write ``model*.safetensors`` and, if there are several files, the index.

    One shard is in memory at a time.

    Args:
        max_shard_size: the most bytes of a shard; a larger tensor gets a shard of its own.
        progress: called with the number of bytes of each tensor that was written.
    """
    shards: list[list[Entry]] = [[]]
    room = max_shard_size
    for entry in entries:
        if entry.num_bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(entry)
        room -= entry.num_bytes
    where, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {}
        for entry in shard:
            tensor = cast(entry.make(), entry.dtype, entry.key)
            tensor = tensor.reshape(entry.shape).contiguous()
            if tensor.untyped_storage().nbytes() > tensor.nbytes:
                tensor = tensor.clone()  # a part would keep the whole that it was cut from
            tensors[entry.key] = tensor
            where[entry.key] = name
            total += entry.num_bytes
            progress(entry.num_bytes)
        try:
            save_file(tensors, folder / name, metadata={"format": "pt"})
            (folder / name).chmod(0o666 & ~current_umask())  # the library's is for its owner only
        except SafetensorError as error:
            raise OSError(f"{name}: {error}") from None
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """The tensor in another dtype.

    Raises:
        ValueError: a value is too large for that dtype: it would become infinite.
    """
    result = tensor.to(dtype)
    if result is not tensor and result.isinf().any():
        lost = tensor[result.isinf() & tensor.isfinite()]
        if len(lost):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{key} holds {lost[0].item():g}, and {name} goes to {torch.finfo(dtype).max:g}: "
                "use another type (--dtype), or leave it as trained."
            )
    return result


def check_is_folder(model: Path) -> None:
    """Refuse a model's folder that is not there.

    Raises:
        UsageError: there is no such folder.
    """
    if not model.is_dir():
        raise UsageError(f"--model is {model}: there is no such folder")


def check_is_model(folder: Path) -> None:
    """Refuse a folder that is not a Hugging Face model; for a training's, name the remedy.

    Raises:
        UsageError: there is no such folder, or no config.json in it.
    """
    check_is_folder(folder)
    if (folder / CONFIG).is_file():
        return
    saved = (folder, folder / CHECKPOINTS, folder.parent)
    checkpoints = next((place for place in saved if (place / TRACKER).is_file()), None)
    remedy = ""
    if checkpoints is not None:
        load = f"--load {shlex.quote(str(checkpoints))}"
        remedy = (
            f" but a checkpoint: dynmoe evaluate takes it as {load}, and dynmoe convert to-hf "
            f"{load} --output DIR makes a model of it"
        )
    raise UsageError(
        f"--model is {folder}: it has no {CONFIG}, so it is no Hugging Face model{remedy}"
    )


class ModelFolder:
    """The weights of a Hugging Face folder, opened for reading; nothing in it is executed."""

    def __init__(self, folder: Path) -> None:
        """Open a folder and read the header of every file.

        Raises:
            UsageError: there is no such folder, or no config.json in it.
            ValueError: a file is missing, damaged or of another kind.
        """
        self.folder = folder
        check_is_model(folder)
        self.config = read_json(folder / CONFIG)
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._open: tuple[Path, Any] | None = None
        self._mapped = 0
        for file in self._files():
            reader = self._reader(file)
            for key in reader.keys():  # noqa: SIM118 - it is not a mapping
                if key in self._file_of:
                    raise ValueError(f"{file}: {key} is also in {self._file_of[key]}")
                part = reader.get_slice(key)
                self._file_of[key] = file
                self._shapes[key], self._dtypes[key] = tuple(part.get_shape()), part.get_dtype()
        self._check_index()

    @property
    def keys(self) -> set[str]:
        """The keys of all tensors."""
        return set(self._file_of)

    def file_of(self, key: str) -> Path:
        """The file that holds a tensor.

        Raises:
            ValueError: no file holds it.
        """
        if key not in self._file_of:
            raise ValueError(f"{self.folder} has no tensor {key}, which its {CONFIG} asks for")
        return self._file_of[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        self.file_of(key)
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """The type of a tensor."""
        file, name = self.file_of(key), self._dtypes[key]
        if name not in WEIGHT_DTYPES:
            raise ValueError(
                f"{file}: {key} is of type {name}; only {', '.join(WEIGHT_DTYPES)} are read"
            )
        return getattr(torch, WEIGHT_DTYPES[name])

    def read(self, key: str, index: int | None = None) -> Tensor:
        """A tensor, or one of the tensors along its first dimension."""
        part = self._reader(self.file_of(key)).get_slice(key)
        tensor = part[:] if index is None else part[index : index + 1].squeeze(0)
        self._mapped += tensor.nbytes
        return tensor.clone()  # a view would keep the file mapped

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.exists():
            where = read_json(index).get("weight_map")
            if not isinstance(where, dict) or not where:
                raise ValueError(f"{index} has no weight_map")
            names = sorted({plain_name(name, index) for name in where.values()})
            if (self.folder / SINGLE).is_file() and SINGLE not in names:
                # save_pretrained leaves one model's file beside the shards of the next.
                raise ValueError(
                    f"{self.folder} holds {SINGLE}, which Transformers would read, and shards that "
                    f"{INDEX} lists: remove what is not the model"
                )
            for name in names:
                if not (self.folder / name).is_file():
                    raise ValueError(f"{self.folder / name} is missing: {INDEX} lists it")
            return [self.folder / name for name in names]
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        pickles = sorted(path.name for path in self.folder.glob("*.bin"))
        if pickles:
            raise ValueError(
                f"{self.folder} holds {pickles[0]}, a pickle, which may run code when it is read: "
                "only safetensors are read; if you trust it, convert it with "
                "save_pretrained(..., safe_serialization=True)"
            )
        raise ValueError(f"{self.folder} holds neither {SINGLE} nor {INDEX}")

    def _check_index(self) -> None:
        index = self.folder / INDEX
        if index.exists():
            for key, name in read_json(index)["weight_map"].items():
                if self._file_of.get(key) != self.folder / name:
                    raise ValueError(f"{self.folder / name} has no tensor {key}: {INDEX} lists it")

    def _reader(self, file: Path) -> Any:
        # Pages that were read from a mapped file count as memory until the file is closed.
        if self._open is None or self._open[0] != file or self._mapped > _MAPPED_AT_MOST:
            self._open, self._mapped = None, 0
            try:
                self._open = file, safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                with file.open("rb") as opened:
                    start = opened.read(2)
                if start in (b"PK", b"\x80\x02", b"\x80\x04"):
                    reason = "it is a pickle, which may run code when it is read"
                else:
                    reason = f"it is cut short or damaged ({error})"
                raise ValueError(f"{file} is no safetensors file: {reason}") from None
        return self._open[1]
