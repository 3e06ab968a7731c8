"""Damaged, hostile and misplaced input: one line that names file and key, and nothing written."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dynmoe.cli import convert as convert_command
from megatron_dynmoe.conversion import convert, folder, megatron_settings, shapes, sources
from megatron_dynmoe.conversion.formats import FORMATS
from megatron_dynmoe.conversion.words import WITHOUT_MEANING
from megatron_dynmoe.storage.manifest import MANIFEST, write_manifest
from megatron_dynmoe.storage.megatron_names import TRACKER
from tests.conversion.checkpoints import EXAMPLES, export, model_config, write_megatron
from tests.helpers.commands import exit_code_of

main = partial(exit_code_of, convert_command.main)


Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A checkpoint and its export in every format."""
    root = tmp_path_factory.mktemp("good")
    return {format: export(root / format, format) for format in FORMATS}


@pytest.fixture
def load(good: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    """A Megatron checkpoint to damage, without the manifest that would find all damage first."""
    load = shutil.copytree(good["dynmoe"][0], tmp_path / "load")
    (load / "release" / MANIFEST).unlink()
    return load


@pytest.fixture
def model(good: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    """A Hugging Face folder to damage."""
    return shutil.copytree(good["dynmoe"][1], tmp_path / "model")


class Refused:
    """Runs a command that must fail with one line and leave everything as it was."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.output = tmp_path / "out" / "new"
        self.output.parent.mkdir()
        self._capsys = capsys

    def __call__(self, *command: Any, says: tuple[str, ...], code: int = 1) -> str:
        before = listing(self.output.parent)
        self._capsys.readouterr()
        assert main([*map(str, command), "--quiet"]) == code
        message = self._capsys.readouterr().err
        assert message.count("\n") == 1, message
        for part in says:
            assert part in message
        assert listing(self.output.parent) == before
        return message

    def to_hf(self, load: Path, *says: str, flags: tuple[str, ...] = (), code: int = 1) -> str:
        command = ("to-hf", "--load", load, "--output", self.output, *flags)
        return self(*command, says=says, code=code)

    def from_hf(self, model: Path, *says: str, flags: tuple[str, ...] = ()) -> str:
        return self("from-hf", "--model", model, "--save", self.output, *flags, says=says)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(tmp_path, capsys)


def listing(parent: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its content."""
    return {
        str(path.relative_to(parent)): path.read_bytes() if path.is_file() else b""
        for path in parent.rglob("*")
    }


def cut(path: Path, size: int = -100) -> None:
    """Shorten a file, by 100 bytes if nothing else is said."""
    data = path.read_bytes()
    path.write_bytes(data[:size])


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file, and the manifest to fit."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    if path.name != MANIFEST:
        write_manifest(path.parent)


def edit_shard(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a shard, and index and manifest to fit."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index = path.parent / folder.INDEX

    def relist(content: dict[str, Any]) -> None:
        where = {key: name for key, name in content["weight_map"].items() if name != path.name}
        content["weight_map"] = where | dict.fromkeys(tensors, path.name)

    edit_json(index, relist)


SHARD = "model-00002-of-00004.safetensors"


def shard_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    write_manifest(path.parent)


# Hugging Face folders -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(lambda f: (f / SHARD).unlink(), (SHARD, "missing"), id="missing shard"),
        pytest.param(lambda f: cut(f / SHARD), (SHARD, "cut short"), id="shard cut short"),
        pytest.param(lambda f: cut(f / SHARD, 5), (SHARD, "cut short"), id="no header"),
        pytest.param(
            lambda f: (f / SHARD).write_bytes(
                (f / SHARD).read_bytes()[:-1] + bytes([(f / SHARD).read_bytes()[-1] ^ 1])
            ),
            (SHARD, "SHA-256"),
            id="flipped bit in the weights",
        ),
        pytest.param(
            lambda f: cut(f / "modeling_dynmoe.py"), ("modeling_dynmoe.py",), id="code changed"
        ),
        pytest.param(
            lambda f: (f / "generation_config.json").unlink(),
            ("generation_config.json", "missing"),
            id="listed file missing",
        ),
        pytest.param(
            lambda f: (f / SHARD).write_bytes(struct.pack("<Q", 2**60) + b"{}"),
            (SHARD, "cut short or damaged"),
            id="huge header",
        ),
        pytest.param(
            lambda f: shard_header(
                f / SHARD, lambda h: h[next(iter(h))].update(shape=[2**40, 2**20])
            ),
            (SHARD, "cut short or damaged"),
            id="huge shape",
        ),
        pytest.param(
            lambda f: torch.save({"a": torch.ones(2)}, f / SHARD), (SHARD, "pickle"), id="pickle"
        ),
        pytest.param(
            lambda f: (
                [path.unlink() for path in f.glob("*.safetensors*")],
                torch.save({}, f / "pytorch_model.bin"),
            ),
            ("pytorch_model.bin", "pickle"),
            id="only pickles",
        ),
        pytest.param(
            lambda f: [path.unlink() for path in f.glob("*.safetensors*")],
            ("neither model.safetensors nor",),
            id="no weights",
        ),
    ],
)
def test_files_of_weights(model: Path, refused: Refused, damage: Damage, says: tuple) -> None:
    damage(model)
    refused.from_hf(model, *says)


KEY = "model.layers.0.mlp.router.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({"model.layers.0.extra": torch.ones(1)}), ("model.layers.0.extra",)),
        (lambda t: t.pop(KEY), (KEY,)),
        (lambda t: t.update({KEY: t[KEY].T.contiguous()}), (KEY, "shape [8, 4]", "[4, 8]")),
        (lambda t: t.update({KEY: t[KEY].bfloat16()}), (KEY, "bfloat16", "float32")),
        (lambda t: t.update({KEY: t[KEY].double()}), (KEY, "F64")),
        (
            lambda t: t.update({"model.layers.0.mlp.router.theta_offset": torch.ones(1)}),
            ("config.json", "theta is [1.0, 1.0]"),
        ),
    ],
    ids=("unknown key", "missing key", "shape", "dtype", "unreadable dtype", "theta"),
)
def test_tensors(
    good: dict[str, tuple[Path, Path]], tmp_path: Path, refused: Refused, change: Any, says: tuple
) -> None:
    model = shutil.copytree(good["dynmoe"][1], tmp_path / "model")
    index = json.loads((model / folder.INDEX).read_text())["weight_map"]
    if says[0] == "config.json":
        edit_json(model / "config.json", lambda c: c.update(theta=[1.0, 1.0]))
    edit_shard(model / index[KEY], change)
    refused.from_hf(model, *says)


@pytest.mark.parametrize("name", ("../model/x", "/etc/passwd", "..", "", "a/b", 3, None, {"x": 1}))
@pytest.mark.parametrize("file", (folder.INDEX, MANIFEST))
def test_no_path_leads_out_of_the_folder(
    model: Path, refused: Refused, file: str, name: Any
) -> None:
    if file == folder.INDEX:
        edit_json(model / file, lambda c: c["weight_map"].update({KEY: name}))
    else:
        name = str(name) + "/"  # JSON has strings only as names
        edit_json(model / file, lambda c: c["files"].update({name: c["files"][SHARD]}))
    refused.from_hf(model, file, repr(name))


@pytest.mark.parametrize("text", ("", "{", "[]", "null", '{"a": NaN}', "[" * 10**5, "\xff", "3"))
@pytest.mark.parametrize("file", ("config.json", folder.INDEX, MANIFEST))
def test_malformed_json(model: Path, refused: Refused, file: str, text: str) -> None:
    (model / file).write_bytes(text.encode("latin-1"))
    refused.from_hf(model, file)


def test_a_name_twice(model: Path, refused: Refused) -> None:
    path = model / "config.json"
    path.write_text(path.read_text().replace("{", '{"vocab_size": 13,', 1))
    refused.from_hf(model, str(path), "'vocab_size'", "twice")


@pytest.mark.parametrize("files", (None, [], {SHARD: 3}, {SHARD: None}, {SHARD: {"bytes": 1}}))
def test_malformed_manifest(model: Path, refused: Refused, files: Any) -> None:
    edit_json(model / MANIFEST, lambda c: c.update(files=files))
    refused.from_hf(model, MANIFEST)


@pytest.mark.parametrize("where", (None, [], {}, "x"))
def test_malformed_index(model: Path, refused: Refused, where: Any) -> None:
    edit_json(model / folder.INDEX, lambda c: c.update(weight_map=where))
    refused.from_hf(model, folder.INDEX, "weight_map")


def test_an_index_that_names_the_wrong_shard(model: Path, refused: Refused) -> None:
    edit_json(model / folder.INDEX, lambda c: c["weight_map"].update({KEY: SHARD}))
    refused.from_hf(model, SHARD, KEY)


def test_a_tensor_in_two_shards(model: Path, refused: Refused) -> None:
    where = json.loads((model / folder.INDEX).read_text())["weight_map"]
    other = next(name for name in where.values() if name != where[KEY])
    tensors = load_file(model / other) | {KEY: torch.ones(4, 8)}
    save_file(tensors, model / other)
    write_manifest(model)
    refused.from_hf(model, KEY, "also in")


# Values that a config.json could hold and should not, by format and setting.
WRONG = ("x", [], {}, -1, 0.5, 10**400, True, [1, 2, 3], 10**12)
# A number or null is right for some; whatever is accepted must also be converted without a fault.
OFTEN_FINE = (0.5, None, 10**12, -1, True, [], {})  # empty is left out


@pytest.mark.parametrize("format", FORMATS)
def test_any_value_of_the_wrong_kind(
    good: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    refused: Refused,
    format: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing but a clear error or a config that works comes out of any single wrong value."""
    monkeypatch.setattr(sources, "check_manifest", lambda *_: None)
    model = shutil.copytree(good[format][1], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    unread = ("architectures", "auto_map")
    for name in config.keys() - set(unread):
        for value in (*WRONG, None):
            (model / "config.json").write_text(json.dumps(config | {name: value}))
            try:
                source = sources.FromFolder(model)
                shapes.Shapes(source.config)
                megatron_settings.training_flags(source.config, source.dtype)
            except ValueError as error:
                named = ("config.json", "settings", name)
                assert any(word in str(error) for word in named), (name, value)
            else:
                ids = name == "eos_token_id" and value == [1, 2, 3]
                assert value in OFTEN_FINE or name in FREE or ids, (name, value)


# What no format's own code looks at either, or what may be a list or names.
FREE = {
    *WITHOUT_MEANING,
    *("controller", "measured_experts_per_token", "rope_theta", "rope_scaling"),
}


@pytest.mark.parametrize(
    ("format", "settings", "says"),
    [
        ("dynmoe", {"threshold": 1.5}, ("threshold", "1.5")),
        ("dynmoe", {"threshold": -0.1}, ("threshold", "-0.1")),
        ("dynmoe", {"threshold": [0.3]}, ("threshold", "2 layers")),
        ("dynmoe", {"threshold": [0.3, 2]}, ("threshold[1]", "2")),
        ("dynmoe", {"threshold": [0.3, None]}, ("threshold[1]",)),
        ("dynmoe", {"threshold": "0.3"}, ("threshold", "'0.3'")),
        ("dynmoe", {"mlp_layer_types": ["sparse", "moe"]}, ("mlp_layer_types[1]", "'moe'")),
        ("dynmoe", {"theta": [1.0]}, ("theta", "2 layers")),
        ("dynmoe", {"num_hidden_layers": 10**9}, ("num_hidden_layers", "2 layers")),
        ("dynmoe", {"num_hidden_layers": "2"}, ("num_hidden_layers", "'2'")),
        ("dynmoe", {"num_experts": 10**9}, ("shape",)),
        ("dynmoe", {"hidden_size": 10**9}, ("shape",)),
        ("dynmoe", {"hidden_act": "gelu"}, ("hidden_act", "'gelu'")),
        ("dynmoe", {"dtype": "bfloat16"}, ("config.json", "bfloat16", "float32")),
        ("dynmoe", {"model_type": "llama", "architectures": None}, ("model_type", "'llama'")),
        ("dynmoe", {"vocab_size": None}, ("vocab_size", "None")),
        ("dynmoe", {"vocab_size": "13"}, ("vocab_size", "'13'")),
        ("dynmoe", {"routing": "topk"}, ("routing", "'topk'")),
        (
            "dynmoe",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            ("config.json", "rope_type is 'yarn'", "training has 'default'"),
        ),
        ("dynamic-moe", {"top_p_threshold": 1.01}, ("top_p_threshold", "1.01")),
        ("dynamic-moe", {"top_p_threshold": "0.4"}, ("top_p_threshold", "'0.4'")),
        ("dynamic-moe", {"num_experts": None}, ("num_experts",)),
        ("dynamic-moe", {"expert_frequency": 0}, ("expert_frequency", "0")),
        ("mixtral", {"num_attention_heads": 0}, ("num_attention_heads", "0")),
        ("mixtral", {"sliding_window": 4096}, ("sliding_window", "4096")),
        ("mixtral", {"num_experts_per_tok": 5}, ("num_experts_per_tok", "5")),
        ("mixtral", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, ("'linear'",)),
        ("mixtral", {"hidden_act": "gelu"}, ("hidden_act", "'gelu'")),
    ],
    ids=str,
)
def test_settings(
    good: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    refused: Refused,
    format: str,
    settings: dict[str, Any],
    says: tuple,
) -> None:
    model = shutil.copytree(good[format][1], tmp_path / "model")
    edit_json(model / "config.json", lambda config: config.update(settings))
    refused.from_hf(model, *says)


def test_frequencies_of_another_base(
    good: dict[str, tuple[Path, Path]], tmp_path: Path, refused: Refused
) -> None:
    model = shutil.copytree(good["dynamic-moe"][1], tmp_path / "model")
    key = "model.layers.1.self_attn.rotary_emb.inv_freq"
    file = json.loads((model / folder.INDEX).read_text())["weight_map"][key]
    for wrong, says in (
        (torch.ones(2), "10000"),
        (torch.ones(3), "shape [3]"),
        (torch.tensor(1.0), "shape []"),
        (torch.tensor([1, 0]), "I64"),
    ):
        edit_shard(model / file, lambda t, wrong=wrong: t.update({key: wrong}))
        refused.from_hf(model, key, says)


# Megatron's checkpoints ---------------------------------------------------------------------------


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


# Targets ------------------------------------------------------------------------------------------


def test_targets_that_are_in_the_way(load: Path, model: Path, refused: Refused) -> None:
    refused.output.write_text("a file")
    refused.to_hf(load, "is a file")
    refused.from_hf(model, "is a file", flags=("--overwrite",))
    refused.output.unlink()
    refused.output.mkdir()
    (refused.output / "kept").write_text("kept")
    refused.to_hf(load, "not empty", "--overwrite")
    refused.from_hf(model, "not empty", "--overwrite")


@pytest.mark.parametrize("relation", (".", "inside", ".."))
def test_the_source_is_never_replaced(
    load: Path, model: Path, refused: Refused, relation: str
) -> None:
    for command, source, read, written in (
        ("to-hf", load, "--load", "--output"),
        ("from-hf", model, "--model", "--save"),
    ):
        before = listing(source)
        target = source / relation
        refused(command, read, source, written, target, "--overwrite", says=(str(source), "read"))
        link = refused.output.parent / "link"
        link.symlink_to(source)
        target = link / relation
        refused(command, read, source, written, target, "--overwrite", says=(str(source), "read"))
        link.unlink()
        assert listing(source) == before


@pytest.mark.parametrize("overwrite", (False, True))
@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), KeyboardInterrupt()))
@pytest.mark.parametrize("name", ("write_shards", "write_manifest", "rename"))
def test_nothing_is_left_of_what_fails(
    load: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: BaseException,
    overwrite: bool,
) -> None:
    if overwrite:
        refused.output.mkdir()
        (refused.output / "kept").write_text("kept")

    def fail(*_: Any) -> None:
        raise error

    rename = Path.rename

    def fail_late(path: Path, target: Path) -> Path:
        return fail() if path.suffix == ".partial" else rename(path, target)

    if name == "rename":
        monkeypatch.setattr(Path, "rename", fail_late)
    else:
        monkeypatch.setattr(convert, name, fail)
    stopped = isinstance(error, KeyboardInterrupt)
    says = ("interrupted",) if stopped else ("No space left",)
    command = ("to-hf", "--load", load, "--output", refused.output, "--overwrite")
    refused(*command, says=says, code=130 if stopped else 1)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """The limit on the size of a file stands for one: writing fails in the libraries themselves."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(load: Path, model: Path, refused: Refused, full_disk: None) -> None:
    refused.to_hf(load, str(refused.output), "cannot be written", "too large")
    refused.from_hf(model, str(refused.output), "cannot be written", "too large")


def test_a_parent_that_cannot_be_made(load: Path, model: Path, refused: Refused) -> None:
    file = refused.output.parent / "file"
    file.write_text("")
    for command in (
        ("to-hf", "--load", load, "--output", file / "new"),
        ("from-hf", "--model", model, "--save", file / "new"),
    ):
        refused(*command, says=(str(file),))


def test_a_missing_parent_is_made(model: Path, tmp_path: Path) -> None:
    save = tmp_path / "a" / "b" / "c"
    assert main(["from-hf", "--quiet", "--model", str(model), "--save", str(save)]) == 0
    assert sorted(path.name for path in save.parent.iterdir()) == ["c"]


def test_overwriting_replaces_all_of_a_folder(load: Path, tmp_path: Path) -> None:
    output = tmp_path / "parent" / "new"
    output.mkdir(parents=True)
    (output / "old").write_text("old")
    command = ["to-hf", "--quiet", "--load", str(load), "--output", str(output), "--overwrite"]
    assert main(command) == 0
    assert (output / "config.json").exists() and not (output / "old").exists()
    assert [path.name for path in output.parent.iterdir()] == ["new"]


def test_a_folder_of_links_is_read_and_left_alone(model: Path, tmp_path: Path) -> None:
    """As the cache of huggingface_hub keeps models, whose files nothing may change."""
    links = tmp_path / "links"
    links.mkdir()
    for path in model.iterdir():
        path.chmod(0o444)
        (links / path.name).symlink_to(path)
    before = listing(model), listing(links)
    assert main(["from-hf", "--quiet", "--model", str(links), "--save", str(tmp_path / "new")]) == 0
    assert (listing(model), listing(links)) == before


@pytest.mark.parametrize("content", (b"", b"garbage", b"\x80\x02cos\nsystem\n(S'false'\ntR."))
@pytest.mark.parametrize("name", ("t.model", "tokenizer.json", "folder"))
def test_what_is_no_tokenizer(load: Path, refused: Refused, name: str, content: bytes) -> None:
    tokenizer = load.parent / name
    if name == "folder":
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_bytes(content)
    else:
        tokenizer.write_bytes(content)
    refused.to_hf(
        load, f"--tokenizer is {tokenizer}", flags=("--tokenizer", str(tokenizer)), code=2
    )


def test_a_tokenizer_that_is_not_there(load: Path, refused: Refused) -> None:
    tokenizer = load.parent / "missing.model"
    refused.to_hf(
        load, f"--tokenizer is {tokenizer}", flags=("--tokenizer", str(tokenizer)), code=2
    )


def test_a_tokenizer_with_code_of_its_own(load: Path, refused: Refused) -> None:
    folder = load.parent / "tokenizer"
    folder.mkdir()
    evidence = load.parent / "evidence"
    (folder / "code.py").write_text(f"open({str(evidence)!r}, 'w')\nclass T: pass\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}})
    )
    refused.to_hf(load, str(folder), flags=("--tokenizer", str(folder)), code=2)
    assert not evidence.exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--threshold", "0.3"), ("--threshold needs --routing",)),
        (("--routing", "top_p", "--threshold", "2"), ("threshold is 2",)),
        (("--routing", "dtop_p"), ("target_experts_per_token",)),
        (("--routing", "top_k"), ("top_k", "knows no k")),
        (("--routing", "best"), ("routing is 'best'",)),
    ],
    ids=str,
)
def test_another_routing(model: Path, refused: Refused, flags: tuple, says: tuple) -> None:
    refused.from_hf(model, *says, flags=flags)
