"""A Hugging Face model folder: shards, index and manifest, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_dynmoe.files import TRACKER, replace_file

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
SINGLE = "model.safetensors"
# The types of weights, as safetensors and as torch name them.
WEIGHT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_HASHED_AT_ONCE = 2**22
_MAPPED_AT_MOST = 2**28


class Entry(NamedTuple):
    """One tensor that a folder shall hold; ``make`` produces it when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place when the block ends well, and else vanishes.

    Raises:
        ValueError: the target exists and is not empty, and ``overwrite`` is not given.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    beside.chmod(0o777 & ~_umask())
    try:
        yield beside
        if target.exists():
            _replace(target, beside)
        else:
            beside.rename(target)
    except OSError as error:
        if error.filename is None:  # a full disk, for one
            raise OSError(f"{target} cannot be written: {error}") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_target(target: Path, overwrite: bool, source: Path | None = None) -> None:
    """Whether a folder may be written; worth asking before hours of reading.

    Args:
        source: the folder that is read, whose files nothing may replace.

    Raises:
        ValueError: the target is a file, lies in one or where nothing may be written, is not empty,
            or shares files with the source.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: name a folder")
    above = next(path for path in Path(os.path.abspath(target)).parents if path.exists())
    if not above.is_dir():
        raise ValueError(f"{target}: {above} is a file: name a folder elsewhere")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{target}: nothing may be written in {above}: name a folder elsewhere")
    if source is not None:
        here, there = target.resolve(), source.resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise ValueError(
                f"{target} is, holds or lies in {source}, which is read: name a folder elsewhere"
            )
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} is not empty: name another folder, or give --overwrite")


def write_shards(
    folder: Path,
    entries: Iterable[Entry],
    max_shard_size: int,
    progress: Callable[[int], Any],
) -> None:
    """Write ``model*.safetensors`` and, for several of them, the index.

    One shard is in memory at a time.

    Args:
        max_shard_size: in bytes; a single larger tensor gets a shard of its own.
        progress: called with the bytes of each tensor that is done.
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
            (folder / name).chmod(0o666 & ~_umask())  # the library's is for its owner only
        except SafetensorError as error:
            raise OSError(f"{name}: {error}") from None
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """A tensor in another type.

    Raises:
        ValueError: a value is beyond that type, in which it would become infinite.
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


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON; numbers so that they are read back exactly."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_is_model(folder: Path) -> None:
    """Refuse what is no Hugging Face folder, with the remedy if it is a training's.

    Raises:
        ValueError: there is no such folder, or no config.json in it.
    """
    if not folder.is_dir():
        raise ValueError(f"model {folder}: no such folder")
    if (folder / CONFIG).is_file():
        return
    saved = (folder, folder / "checkpoints", folder.parent)
    checkpoints = next((place for place in saved if (place / TRACKER).is_file()), None)
    remedy = (
        ""
        if checkpoints is None
        else (
            " but a checkpoint, of which tools/convert_checkpoint.py to-hf "
            f"--load {checkpoints} --output DIR makes one"
        )
    )
    raise ValueError(f"model {folder}: it has no {CONFIG}, so it is no Hugging Face model{remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing or holds something else, such as a name twice.
    """
    try:
        content = json.loads(
            path.read_text("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of names and values")
    return content


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of every file in the folder to ``manifest.json``."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    files = {name: fingerprint(folder / name) for name in names if name != MANIFEST}
    write_json(folder / MANIFEST, {"files": files})


def update_manifest(folder: Path, names: Iterable[str]) -> None:
    """Bring the entries of some files up to date, where the folder has a manifest."""
    path = folder / MANIFEST
    if path.exists():
        manifest = read_json(path)
        manifest["files"] |= {name: fingerprint(folder / name) for name in names}
        replace_file(path, lambda partial: write_json(partial, manifest))


def fingerprint(path: Path, progress: Callable[[int], Any] = lambda _: None) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a manifest has them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_AT_ONCE):
            digest.update(chunk)
            progress(len(chunk))
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def check_manifest(folder: Path, progress: Callable[[int], Any] = lambda _: None) -> None:
    """Compare every file with the manifest, where the folder has one.

    Raises:
        ValueError: a file is missing or differs; the message names it.
    """
    for name, expected in (read_manifest(folder) or {}).items():
        check_file(folder / name, expected, progress)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What the manifest says of each file; None where the folder has none.

    Raises:
        ValueError: the manifest is damaged, or names files elsewhere.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    files = read_json(path).get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path} has no list of files")
    for name, expected in files.items():
        plain_name(name, path)
        if not isinstance(expected, dict) or expected.keys() != {"sha256", "bytes"}:
            raise ValueError(f"{path}: {name} needs exactly sha256 and bytes")
        if type(expected["bytes"]) is not int:
            raise ValueError(f"{path}: {name} has {expected['bytes']!r} bytes, no whole number")
    return files


def check_file(
    file: Path, expected: dict[str, Any], progress: Callable[[int], Any] = lambda _: None
) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        ValueError: it is missing or differs.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing: {MANIFEST} lists it")
    if file.stat().st_size != expected["bytes"]:
        raise ValueError(
            f"{file} has {file.stat().st_size} bytes, {MANIFEST} says {expected['bytes']}: it "
            "is cut short or was changed"
        )
    if fingerprint(file, progress) != expected:
        raise ValueError(f"{file} does not have the SHA-256 of {MANIFEST}: it was changed")


class ModelFolder:
    """The weights of a Hugging Face folder, opened for reading; nothing in it is executed."""

    def __init__(self, folder: Path) -> None:
        """Open a folder and look at every file's header.

        Raises:
            ValueError: a file is missing, damaged or of another kind.
        """
        self.folder = folder
        if not folder.is_dir():
            raise ValueError(f"--model is {folder}: there is no such folder")
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
            ValueError: none does.
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
        """A tensor, or one of those that lie along its first dimension."""
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
                "only safetensors are read; convert it where you trust it, with "
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
        # The pages that were read of a mapped file count as memory until it is closed.
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


def plain_name(name: Any, source: Path) -> str:
    """The name of a file in the folder of ``source``, which gives it.

    Raises:
        ValueError: it leads elsewhere.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{source} names {name!r}: only files in its own folder are read")
    return name


def _replace(target: Path, new: Path) -> None:
    """Put a folder in another's place; the old one goes only when the new one is there."""
    parked = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    old = target.rename(parked / target.name)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        parked.rmdir()
        raise
    shutil.rmtree(parked)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
