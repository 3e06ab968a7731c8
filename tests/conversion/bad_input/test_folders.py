"""Damaged and hostile Hugging Face folders: one line that names file and key."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dynmoe.conversion import shapes, sources
from megatron_dynmoe.conversion.formats import FORMATS
from megatron_dynmoe.conversion.hugging_face import folder
from megatron_dynmoe.conversion.hugging_face.words import WITHOUT_MEANING
from megatron_dynmoe.conversion.megatron import settings as megatron_settings
from megatron_dynmoe.storage.manifest import MANIFEST, write_manifest
from tests.conversion.bad_input.damage import (
    SHARD,
    Damage,
    Refused,
    cut,
    edit_json,
    edit_shard,
    shard_header,
)


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
            lambda f: shutil.copyfile(f / SHARD, f / folder.SINGLE),
            ("holds model.safetensors, which", "remove what is not the model"),
            id="two models",
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


def with_settings(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> Path:
    """A copy of a folder with other words in its config.json."""
    model = shutil.copytree(folder, tmp_path / "model")
    edit_json(model / "config.json", lambda config: config.update(settings))
    return model


@pytest.mark.parametrize(
    ("format", "settings", "says"),
    [
        ("dynmoe", {"threshold": 1.5}, ("threshold", "1.5")),
        ("dynmoe", {"rope_parameters": {"full_attention": {}}}, ("values for full_attention",)),
        ("mixtral", {"rope_scaling": {"rope_theta": "x"}}, ("rope_theta is 'x': use a number",)),
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
        ("dynmoe", {"model_type": "gpt2", "architectures": None}, ("model_type", "'gpt2'")),
        ("dynmoe", {"vocab_size": None}, ("vocab_size", "None")),
        ("dynmoe", {"vocab_size": "13"}, ("vocab_size", "'13'")),
        ("dynmoe", {"routing": "topk"}, ("routing", "'topk'")),
        ("dynamic-moe", {"top_p_threshold": 1.01}, ("top_p_threshold", "1.01")),
        ("dynamic-moe", {"top_p_threshold": "0.4"}, ("top_p_threshold", "'0.4'")),
        ("dynamic-moe", {"num_experts": None}, ("num_experts",)),
        ("dynamic-moe", {"expert_frequency": 0}, ("expert_frequency", "0")),
        ("mixtral", {"num_attention_heads": 0}, ("num_attention_heads", "0")),
        ("mixtral", {"num_experts_per_tok": 5}, ("num_experts_per_tok", "5")),
        ("qwen3-moe", {"mlp_only_layers": ["1"]}, ("mlp_only_layers", "['1']")),
        ("qwen3-moe", {"decoder_sparse_step": 0}, ("decoder_sparse_step", "0")),
        ("qwen3-moe", {"norm_topk_prob": None}, ("norm_topk_prob", "None")),
        ("qwen3-moe", {"num_key_value_heads": None}, ("no num_key_value_heads",)),
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
    model = with_settings(good[format][1], tmp_path, settings)
    refused.from_hf(model, *says)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("format", "settings", "says"),
    [
        ("dynmoe", {"rope_parameters": YARN}, ("rope_type is 'yarn'", "take the scaling out")),
        ("mixtral", {"hidden_act": "gelu"}, ("hidden_act is 'gelu'", "use another model")),
        ("mixtral", {"sliding_window": 4096}, ("sliding_window is 4096", "set it to null")),
        ("mixtral", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, ("is 'linear'",)),
        ("qwen3-moe", {"rope_scaling": YARN}, ("rope_type is 'yarn'", "take the change out")),
        ("qwen3-moe", {"rope_parameters": YARN}, ("rope_type is 'yarn'", "take the change out")),
        # Transformers goes by the older word, if there are both.
        (
            "qwen3-moe",
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            ("rope_type is 'yarn'",),
        ),
        (
            "qwen3-moe",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            ("rope_parameters has values for full_attention each", "give the values of one kind"),
        ),
        ("llama", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor is 0.5", "take the")),
        ("qwen3-moe", {"use_sliding_window": True}, ("use_sliding_window is True", "to false")),
        (
            "qwen3-moe",
            {"layer_types": ["full_attention", "sliding_attention"]},
            ("layer_types is ['full_attention', 'sliding_attention']", "leave layer_types out"),
        ),
        ("mixtral", {"num_experts_per_tok": 1}, ("num_experts_per_tok is 1", "--routing top_p")),
        (
            "qwen3-moe",
            {"num_experts_per_tok": 1, "norm_topk_prob": True},
            ("num_experts_per_tok is 1", "--routing top_p"),
        ),
        ("llama", {"mlp_bias": True}, ("mlp_bias is True", "another model")),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("is 'llama3'",)),
        ("qwen3", {"use_sliding_window": True}, ("use_sliding_window is True", "to false")),
        ("qwen3-moe", {"attention_bias": True}, ("attention_bias is True", "another model")),
        (
            "qwen3-moe",
            {"quantization_config": {"quant_method": "fp8"}},
            ("quantization_config is", "weights of float32, bfloat16"),
        ),
    ],
    ids=str,
)
def test_what_training_does_not_have(
    good: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    refused: Refused,
    format: str,
    settings: dict[str, Any],
    says: tuple,
) -> None:
    model = with_settings(good[format][1], tmp_path, settings)
    refused.from_hf(model, "config.json: ", *says, code=2)


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
