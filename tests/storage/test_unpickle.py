"""The pickles inside a checkpoint: what is needed is read, nothing else does anything."""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import enum
import functools
import io
import os
import pickle
import shlex
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata

from megatron_dynmoe.cli.convert import main
from megatron_dynmoe.conversion.megatron.checkpoint import MegatronCheckpoint
from megatron_dynmoe.storage import unpickle
from megatron_dynmoe.storage.manifest import MANIFEST
from megatron_dynmoe.storage.unpickle import StoredTensor, Unknown, load_metadata, load_objects
from tests.conversion.checkpoints import DTOP_P, model_config, write_megatron


class Reduced:
    """Is unpickled as the result of a call."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.call = (function, args, state) if state is not None else (function, args)

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """A pickle only holds calls of what can be called."""


class Kind(enum.Enum):
    """Of a module that a reader need not have."""

    ONE = 1


def traps(evidence: Path) -> dict[str, Any]:
    """Objects that would leave ``evidence`` behind if a pickle may call what it likes."""
    code = f"open({str(evidence)!r}, 'w')"
    touch = shlex.join(["touch", str(evidence)])
    saved = io.BytesIO()
    torch.save(Reduced(os.system, touch), saved)
    return {
        "os.system": Reduced(os.system, touch),
        "eval": Reduced(eval, code),
        "exec": Reduced(exec, code),
        "open": Reduced(builtins.open, str(evidence), "w"),
        "nested": [{"a": (Reduced(list, [Reduced(eval, code)]),)}],
        "getattr": Reduced(Reduced(getattr, Reduced(__import__, "os"), "system"), touch),
        "import": Reduced(Reduced(getattr, Reduced(__import__, "os"), "mkdir"), str(evidence)),
        "rmtree": Reduced(shutil.rmtree, str(evidence.parent)),
        "torch.load": Reduced(
            functools.partial(torch.load, weights_only=False),
            Reduced(io.BytesIO, saved.getvalue()),
        ),
        "storage": Reduced(torch.storage._load_from_bytes, saved.getvalue()),
        "jit": Reduced(torch.jit.load, str(evidence)),
        "numpy": Reduced(__import__("numpy").save, str(evidence), 1),
    }


TRAPS = tuple(traps(Path("x")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_megatron(tmp_path_factory.mktemp("good") / "load", model_config(**DTOP_P))


@pytest.fixture
def load(checkpoint: Path, tmp_path: Path) -> Path:
    load = shutil.copytree(checkpoint, tmp_path / "load")
    (load / "release" / MANIFEST).unlink()  # it would find what is changed here
    return load


@pytest.mark.parametrize("name", TRAPS)
def test_metadata_runs_nothing(load: Path, tmp_path: Path, name: str) -> None:
    evidence = tmp_path / "evidence"
    path = load / "release" / ".metadata"
    content = pickle.loads(path.read_bytes())
    content.planner_data = traps(evidence)[name]
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"\.metadata .* asks for .*; nothing was run"):
        load_metadata(path)
    assert not evidence.exists() and load.exists()


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("file", ("common.pt", "the shard"))
def test_saved_arguments_run_nothing(tmp_path: Path, name: str, file: str) -> None:
    """Among the arguments a call is not an error: enumerations of a run look the same."""
    evidence = tmp_path / "evidence"
    trap = traps(evidence)[name]
    config = model_config(**DTOP_P)
    load, output = tmp_path / "load", tmp_path / "new"
    if file == "common.pt":
        write_megatron(load, config)
        args = MegatronCheckpoint(load).args
        args.trap = trap
        torch.save({"args": args, "trap": trap, "iteration": 7}, load / "release" / file)
        assert MegatronCheckpoint(load).iteration == 7
    else:
        write_megatron(load, config, trap=trap)
    assert main(["to-hf", "--quiet", "--load", str(load), "--output", str(output)]) == 0
    assert not evidence.exists() and load.exists()


def test_a_pickle_cannot_change_classes(tmp_path: Path) -> None:
    """A state of two parts sets attributes, of a class too, if the pickle is given the class."""
    for cls, name in (
        (metadata.MetadataIndex, "__hash__"),
        (argparse.Namespace, "__getattribute__"),
        (filesystem._StorageInfo, "relative_path"),
    ):
        module = cls.__module__
        before = dict(vars(cls))
        attack = (
            b"c" + f"{module}\n{cls.__name__}\n".encode()
            + b"(N}V" + f"{name}\n".encode() + b"ccollections\nOrderedDict\nstb."
        )  # fmt: skip
        path = tmp_path / "attack"
        path.write_bytes(attack)
        with pytest.raises(ValueError, match="attack"):
            load_metadata(path)
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("archive/data.pkl", attack)
        with contextlib.suppress(ValueError):
            load_objects(path, archive.getvalue())
        assert dict(vars(cls)) == before


def test_arguments_of_unknown_classes_are_inert(tmp_path: Path) -> None:
    saved = io.BytesIO()
    args = argparse.Namespace(
        kind=Kind.ONE,
        path=Path("x"),
        ordered=collections.OrderedDict(a=1),
        deque=collections.deque([1, 2]),
        counter=collections.Counter("aab"),
        dtype=torch.bfloat16,
        tensor=torch.arange(3.0),
        function=os.path.join,
        values=[1, 2.5, "three", None, True, {"four": (4,)}],
    )
    torch.save({"args": args}, saved)
    loaded = load_objects(tmp_path / "common.pt", saved.getvalue())["args"]
    assert type(loaded) is argparse.Namespace
    assert loaded.values == args.values
    assert loaded.dtype is torch.bfloat16 and loaded.ordered == {"a": 1}
    for name in ("kind", "path", "deque", "counter", "tensor"):
        assert isinstance(getattr(loaded, name), Unknown), name
    assert issubclass(loaded.function, Unknown)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_metadata_comes_back_whole(load: Path, protocol: int) -> None:
    path = load / "release" / ".metadata"
    expected = pickle.loads(path.read_bytes())
    expected.storage_meta = metadata.StorageMeta(checkpoint_id=Path("/somewhere"))
    path.write_bytes(pickle.dumps(expected, protocol))
    loaded = load_metadata(path)
    for entry in (*loaded.state_dict_metadata.values(), *expected.state_dict_metadata.values()):
        if isinstance(entry, metadata.TensorStorageMetadata):
            entry.properties.layout = None  # not read
    assert loaded.state_dict_metadata == expected.state_dict_metadata
    assert loaded.storage_data == expected.storage_data
    assert len(loaded.storage_data) > 20


@pytest.mark.parametrize(
    "content", (b"", b"garbage", b"PK\x03\x04", b"\x80\x02.", pickle.dumps({}), pickle.dumps([1]))
)
def test_no_pickle_or_another(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged or no checkpoint"):
        load_metadata(path)
    with pytest.raises(ValueError, match=f"{path} is damaged or no checkpoint"):
        load_objects(path, content)


def test_archives_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "common.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    assert isinstance(load_objects(path, path.read_bytes()), Unknown)  # its code is not read
    torch.save({}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"common\.pt is damaged"):
        load_objects(path, path.read_bytes())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"\x00" * 10**6)
    with pytest.raises(ValueError, match="larger than the file"):
        load_objects(path, path.read_bytes())


def test_tensors_are_read_as_weights_only(
    load: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards hold pickles, too; here one that calls something instead of a tensor."""
    evidence, key = tmp_path / "evidence", "decoder.final_layernorm.weight"
    monkeypatch.chdir(tmp_path)  # the trap has to fit in, however long this path is
    checkpoint = MegatronCheckpoint(load)
    index = metadata.MetadataIndex(key, torch.Size([0]))
    info = checkpoint._storage[index]
    trap = io.BytesIO()
    torch.save(Reduced(os.system, f"touch {evidence.name}"), trap)
    path = load / "release" / info.relative_path
    data = bytearray(path.read_bytes())
    assert len(trap.getvalue()) <= info.length
    data[info.offset : info.offset + info.length] = trap.getvalue().ljust(info.length, b"\0")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{info.relative_path}: {key} cannot be read"):
        checkpoint.read(key)
    assert not evidence.exists()


@pytest.mark.parametrize("from_bytes", [False, True])
def test_tensors_are_read_when_they_are_asked_for(tmp_path: Path, from_bytes: bool) -> None:
    path, whole = tmp_path / "model.pt", torch.randn(6, 8)
    tensors = {
        "whole": whole,
        "view": whole[2:4],
        "transposed": whole[1:5].t(),
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 3),
        "bf16": torch.randn(3, 2).bfloat16(),
        "int": torch.arange(5),
        "bool": torch.tensor([True, False]),
    }
    torch.save({"nested": [tensors]}, path)
    loaded = load_objects(path, path.read_bytes() if from_bytes else None)["nested"][0]
    for name, expected in tensors.items():
        stored = loaded[name]
        assert isinstance(stored, StoredTensor) and stored.shape == expected.shape
        assert stored.dtype == expected.dtype and stored.numel == expected.numel()
        assert torch.equal(stored.read(), expected), name


def archive_again(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """The same members, ``change(data)`` in place of the numbers of the first tensor."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name.endswith("/data/0") else content)


def test_tensors_that_no_training_saves_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for tensor in (torch.ones(1).expand(10**12), torch.ones(100)[::50]):
        torch.save(tensor, path)
        with pytest.raises(ValueError, match="has strides"):
            load_objects(path).read()
    torch.save(torch.ones(100), path)
    archive_again(path, lambda content: content[:-4])
    with pytest.raises(ValueError, match="declared larger than what is stored"):
        load_objects(path).read()
    torch.save(torch.ones(100), path)
    archive_again(path, bytes, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        load_objects(path).read()


def test_a_tensor_made_of_something_else_is_inert(tmp_path: Path) -> None:
    path, evidence = tmp_path / "model.pt", tmp_path / "evidence"
    rebuild = torch._utils._rebuild_tensor_v2
    for first in (Reduced(os.mkdir, str(evidence)), "storage", None):
        torch.save([Reduced(rebuild, first, 0, (1,), (1,), False, None)], path)
        (loaded,) = load_objects(path)
        assert isinstance(loaded, Unknown) and not isinstance(loaded, StoredTensor)
    assert not evidence.exists()


def test_only_these_names_are_looked_up() -> None:
    """Whoever adds one should know that a checkpoint of anybody's may then call it."""
    names = {f"{m}.{n}" for m, n in (*unpickle._METADATA_CLASSES, *unpickle._OBJECT_CLASSES)}
    assert names == {
        "argparse.Namespace",
        "collections.OrderedDict",
        "torch.Size",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        *(
            f"torch.distributed.checkpoint.metadata.{name}"
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }
