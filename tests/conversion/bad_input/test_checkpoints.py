"""Damaged and hostile checkpoints of Megatron: one line that names file and key."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dynmoe.conversion import sources
from megatron_dynmoe.storage.manifest import MANIFEST
from megatron_dynmoe.storage.megatron_names import TRACKER
from tests.conversion.bad_input.damage import (
    Damage,
    Refused,
    cut,
)
from tests.conversion.checkpoints import EXAMPLES, model_config, write_megatron


def edit_metadata(load: Path, change: Callable[[Any], Any]) -> None:
    """Change the metadata of a checkpoint as it lies on disk."""
    path = load / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


ROUTER = "decoder.layers.mlp.router.weight"
DISTCP = "__0_0.distcp"


def resized(key: str, size: tuple[int, ...]) -> Damage:
    """Declare another size for an entry, in its only part as well."""

    def change(metadata: Any) -> None:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

        entry = metadata.state_dict_metadata[key]
        entry.size = torch.Size(size)
        first = entry.chunks[0]
        offsets = torch.Size([0] * len(size))
        entry.chunks = [ChunkStorageMetadata(offsets, torch.Size(size))]
        stored = metadata.storage_data[MetadataIndex(key, first.offsets)]
        metadata.storage_data[MetadataIndex(key, offsets)] = stored

    return change


def renamed(name: Any) -> Damage:
    """Let all that is stored lie in another file."""

    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    return change


def with_info(**values: Any) -> Damage:
    """Let one stored part lie elsewhere."""

    def change(metadata: Any) -> None:
        for name, value in values.items():
            setattr(next(iter(metadata.storage_data.values())), name, value)

    return change


def overlapping(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["embedding.word_embeddings.weight"]
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    (chunk,) = entry.chunks
    info = metadata.storage_data[MetadataIndex("embedding.word_embeddings.weight", chunk.offsets)]
    halves = [((0, 0), (6, 8)), ((1, 0), (7, 8))]  # as many elements as the whole
    entry.chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in halves]
    for offsets, _ in halves:
        index = MetadataIndex("embedding.word_embeddings.weight", torch.Size(offsets))
        metadata.storage_data[index] = info


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.state_dict_metadata.update({"decoder.x": m.state_dict_metadata[ROUTER]}),
         (".metadata", "decoder.x")),
        (lambda m: m.state_dict_metadata.pop(ROUTER), (ROUTER,)),
        (resized(ROUTER, (2, 8, 4)), (ROUTER, "[2, 8, 4]")),
        (resized(ROUTER, (2, 2**40, 8)), (ROUTER, "stored")),
        (resized("decoder.layers.mlp.router.threshold", (2, 0)), ("threshold", "[1]")),
        (lambda m: setattr(m.state_dict_metadata[ROUTER].properties, "dtype", torch.bfloat16),
         (ROUTER, "bfloat16")),
        (lambda m: setattr(m.state_dict_metadata[ROUTER], "chunks", []), (ROUTER, "cover")),
        (lambda m: setattr(m.state_dict_metadata[ROUTER], "chunks", 3), (".metadata", "list")),
        (lambda m: setattr(m.state_dict_metadata[ROUTER], "size", [2, 4, 8]), ("Size",)),
        (lambda m: m.state_dict_metadata.update({ROUTER: 3}), (".metadata", "int")),
        (lambda m: m.storage_data.clear(), ("stored",)),
        (lambda m: setattr(m, "storage_data", None), (".metadata", "dict")),
        (lambda m: setattr(m, "state_dict_metadata", []), (".metadata", "dict")),
        (renamed("../../etc/passwd"), (".metadata", "'../../etc/passwd'")),
        (renamed("/etc/passwd"), (".metadata", "'/etc/passwd'")),
        (renamed(".."), (".metadata", "'..'")),
        (renamed(7), (".metadata", "int")),
        (renamed("other.distcp"), ("other.distcp", "missing")),
        (with_info(offset=-4), (".metadata", "-4")),
        (with_info(length=2**60), (DISTCP, "cut short")),
        (with_info(offset="x"), (".metadata", "'x'")),
        (overlapping, ("embedding.word_embeddings.weight", "cover")),
    ],
)  # fmt: skip
def test_metadata(load: Path, refused: Refused, change: Damage, says: tuple) -> None:
    edit_metadata(load, change)
    refused.to_hf(load, *says)


def test_manifest_of_a_checkpoint(
    good: dict[str, tuple[Path, Path]], tmp_path: Path, refused: Refused
) -> None:
    load = shutil.copytree(good["dynmoe"][0], tmp_path / "load")
    path = load / "release" / DISTCP
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # between the records, where no other check looks
    path.write_bytes(content)
    refused.to_hf(load, DISTCP, MANIFEST)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "release" / DISTCP).unlink(), (DISTCP, "missing")),
        (lambda f: cut(f / "release" / DISTCP), (DISTCP, "cut short")),
        (lambda f: cut(f / "release" / ".metadata"), (".metadata", "damaged")),
        (lambda f: (f / "release" / ".metadata").write_bytes(b""), (".metadata", "damaged")),
        (lambda f: (f / "release" / "common.pt").write_bytes(b"PK\x03\x04"), ("common.pt",)),
        (lambda f: torch.save([1], f / "release" / "common.pt"), ("no arguments",)),
        (lambda f: (f / TRACKER).write_text("soon"), ("'soon'", TRACKER)),
        (lambda f: (f / TRACKER).write_text("7"), ("iter_0000007", "none")),
        (lambda f: (f / TRACKER).write_bytes(b"\xff\xb2"), (TRACKER,)),
    ],
)
def test_files_of_a_checkpoint(load: Path, refused: Refused, damage: Damage, says: tuple) -> None:
    damage(load)
    refused.to_hf(load, *says)


def test_a_checkpoint_that_is_not_there_is_misuse(load: Path, refused: Refused) -> None:
    flags = ("--iteration", "3")
    refused.to_hf(load, "iter_0000003", "the iterations there: none", flags=flags, code=2)
    (load / TRACKER).unlink()
    refused.to_hf(load, TRACKER, "--load", code=2)
    shutil.rmtree(load)
    refused.to_hf(load, "no such folder", code=2)


def test_bits_flipped_anywhere_in_a_checkpoint(load: Path, refused: Refused) -> None:
    """In a header or pickle the reader says so; in the weights only a hash could tell."""
    generator = torch.Generator().manual_seed(0)
    path = load / "release" / ".metadata"
    whole = path.read_bytes()
    for place in torch.randint(len(whole), (150,), generator=generator).tolist():
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            sources.FromMegatron(load)
        except ValueError as error:
            assert "release" in str(error), place


@pytest.mark.parametrize("old", (True, False))
def test_checkpoints_of_another_kind(tmp_path: Path, refused: Refused, old: bool) -> None:
    load = tmp_path / "load"
    iteration = load / "iter_0000003"
    iteration.mkdir(parents=True)
    (load / TRACKER).write_text("3")
    if old:
        (iteration / "mp_rank_00").mkdir()
        torch.save({}, iteration / "mp_rank_00" / "model_optim_rng.pt")
        refused.to_hf(load, "iter_0000003", "torch_dist")
    else:
        from torch.distributed.checkpoint import FileSystemWriter, save

        save({"a": torch.ones(2)}, storage_writer=FileSystemWriter(iteration), no_dist=True)
        refused.to_hf(load, "iter_0000003", "no arguments")
    refused.to_hf(load, "iter_0000009", "iter_0000003", flags=("--iteration", "9"), code=2)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"num_layers": 10**9}, ("num_layers", "2 layers")),
        ({"num_layers": 1}, ("num_layers 1", "2 layers")),
        ({"num_layers": None}, ("num_layers",)),
        ({"num_experts": 2}, ("router.weight", "[2, 2, 8]")),
        ({"num_experts": "4"}, ("num_experts", "'4'")),
        ({"moe_layer_freq": 0}, ("moe_layer_freq is 0",)),
        ({"moe_layer_freq": [1]}, ("[1]", "2 layers")),
        ({"rotary_base": None}, ("arguments",)),
        ({"hidden_size": 2**40}, ("shape",)),
        ({"swiglu": False}, ("swiglu", "False")),
        ({"num_attention_heads": 0}, ("num_attention_heads",)),
        (
            {"moe_dynamic_settings": {"routing": "top_p", "inference_threshold": 2}},
            ("inference_threshold", "2"),
        ),
        ({"moe_dynamic_settings": 7}, ("arguments",)),
        ({"huggingface_source": {"inv_freq_dtype": "load"}}, ("'load'",)),
    ],
    ids=str,
)
def test_saved_arguments(
    tmp_path: Path, refused: Refused, args: dict[str, Any], says: tuple
) -> None:
    config = model_config(**EXAMPLES["dynmoe"])
    refused.to_hf(write_megatron(tmp_path / "load", config, **args), *says)


def test_a_threshold_in_a_checkpoint(tmp_path: Path, refused: Refused) -> None:
    config = model_config(**EXAMPLES["dynmoe"])
    for value, says in ((1.5, "threshold[0] is 1.5"), (float("nan"), "is nan")):
        load = write_megatron(tmp_path / f"load{value}", config, threshold=value)
        refused.to_hf(load, says)
