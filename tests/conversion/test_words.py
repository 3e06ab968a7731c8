"""No word of a config.json vanishes: kept, refused or named, or listed as without a meaning."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megatron_dynmoe.conversion.convert import Target, from_hf, to_hf
from megatron_dynmoe.conversion.formats import FORMATS
from megatron_dynmoe.conversion.hugging_face.words import WITHOUT_MEANING
from megatron_dynmoe.conversion.megatron import settings as megatron_settings
from megatron_dynmoe.huggingface import DynMoEModelConfig
from megatron_dynmoe.layers.moe import routing_loss
from megatron_dynmoe.storage.manifest import write_manifest
from tests.conversion.checkpoints import DTOP_P, EXAMPLES, export, model_config, write_megatron
from tests.helpers.tiny_export import VOCAB_SIZE, make_tokenizer

PUBLISHED = (  # of the released Dynamic MoE
    *("num_experts", "experts_topk", "expert_frequency", "top_p_threshold", "hidden_size"),
    *("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps", "vocab_size", "tie_word_embeddings"),
    *("architectures", "model_type", "torch_dtype", "transformers_version", "rope_scaling"),
)
# What the file of each format may hold, by the code of others; what we write is tried as well.
FIELDS = {
    "mixtral": {*MixtralConfig().to_dict(), "sliding_window", "torch_dtype", "rope_theta"},
    "qwen3-moe": {*Qwen3MoeConfig().to_dict(), "num_experts", "layer_types", "rope_theta"},
    "llama": {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"},
    "qwen3": {*Qwen3Config().to_dict(), "rope_theta"},
    "dynamic-moe": {*LlamaConfig().to_dict(), *PUBLISHED} - {"rope_parameters"},
}
LIKE_OTHERS = ("llama", "qwen3")  # which have no reading of their own: qwen3-moe's is tried always
MIXTRAL = FORMATS["mixtral"]
# Another value than the one in the file, if adding 1, turning round or a new word do not make one.
OTHER: dict[str, Any] = {
    "attention_dropout": 0.25,
    "balance_loss": "aux_loss",
    "budget_curve": [{"experts_per_token": 1.5, "threshold": 0.2, "loss": None}],
    "controller": DTOP_P["controller"] | {"scope": "layer"},
    "eos_token_id": [5, 6],
    "expert_frequency": 2,
    "hidden_act": "gelu",
    "hidden_dropout": 0.25,
    "inference_max_experts_per_token": 3,
    "inference_threshold": 0.5,
    "initializer_range": 0.5,
    "max_experts_per_token": 3,
    "measured_experts_per_token": [1.5, 2.5],
    "mlp_only_layers": [1],
    "mlp_layer_types": ["dense", "sparse"],
    "num_experts_per_tok": 1,
    "partial_rotary_factor": 0.5,
    "router_dtype": "bfloat16",
    "router_jitter_noise": 0.01,
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    "rope_theta": 77.0,
    "sliding_window": 8,
    "target_experts_per_token": 3.0,
    "theta": [1.5, 1.5],
    "threshold": 0.7,
    "top_p_threshold": 0.7,
    "weights": "raw",
    "normalization": "none",
    "routing": "top_p",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {format: export(root / format, format)[1] for format in EXAMPLES}


def change(folder: Path, name: str = "config.json", **words: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | words))
    write_manifest(folder)
    return folder


def another(name: str, value: Any) -> Any:
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else 1


@pytest.mark.parametrize(
    ("format", "name"),
    [
        pytest.param(name, word, marks=[pytest.mark.long] if name in LIKE_OTHERS else [])
        for name, format in FORMATS.items()
        for word in sorted(
            FIELDS.get(name, set())
            | format.words()
            | format.to_format(model_config(**EXAMPLES[name]), "float32").keys()
        )
    ],
)
def test_every_word_is_kept_refused_named_or_without_a_meaning(
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    format: str,
    name: str,
) -> None:
    if name in WITHOUT_MEANING:
        return
    model = tmp_path / "model"
    model.mkdir()
    for file in folders[format].iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    value = another(name, config.get(name))
    (model / "config.json").unlink()
    (model / "manifest.json").unlink()
    words = config | {name: value}
    (model / "config.json").write_text(json.dumps(words))
    try:
        from_hf(model, tmp_path / "save", progress=False)
        to_hf(tmp_path / "save", Target(tmp_path / "back", format=format))
    except ValueError as error:
        told = str(error)
    else:
        told = capsys.readouterr().err.replace(f"format {format}", "")
        back = json.loads((tmp_path / "back" / "config.json").read_text())
        reread = (FORMATS[format].from_format(back), FORMATS[format].from_format(words))
        kept = name in back and back[name] == value
        kept |= isinstance(value, dict) and back.get(name, {}).items() >= value.items()
        kept |= name in reread[0] and name in reread[1] and alike(name, *reread)
        kept |= name in ("rope_theta", "rope_parameters") and alike("rope_parameters", *reread)
        if kept:
            return
    # Of a size it may name the tensor that contradicts it.
    contradicted = ("the settings say", "of this config.json", "its config.json asks for")
    contradicted += ("layer 0 is dense",)
    assert name in told or any(word in told for word in contradicted), told


def alike(name: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the two say the same, be it once for all layers."""
    values = [entry[name] for entry in (one, other)]
    return values[0] == values[1] or any(v == [w] * 2 for v, w in (values, values[::-1]))


def test_the_base_class_has_no_word_that_nobody_has_judged() -> None:
    assert set(PreTrainedConfig().to_dict()) <= set(WITHOUT_MEANING)


@pytest.mark.parametrize("format", FORMATS)
def test_an_unknown_word_is_named(
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    format: str,
) -> None:
    config = json.loads((folders[format] / "config.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    for file in folders[format].iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    change(model, logit_scale=0.5, nothing=None)
    from_hf(model, tmp_path / "save", progress=False)
    told = capsys.readouterr().err
    assert "logit_scale 0.5" in told and "nothing" not in told
    to_hf(model, Target(tmp_path / "ours"))
    told = capsys.readouterr().err
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert ("logit_scale 0.5" in told) != (ours.get("logit_scale") == 0.5)
    assert config["vocab_size"] == ours["vocab_size"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("eos", [7, [7, 9], None])
def test_ids_and_generation_come_back_without_a_tokenizer(
    tmp_path: Path, format: str, eos: Any
) -> None:
    _, model = export(tmp_path, format)
    ids = {"bos_token_id": 4, "eos_token_id": eos, "pad_token_id": None}
    change(model, **ids)
    generation = {"eos_token_id": [7, 8, 9], "temperature": 0.6, "do_sample": True, "top_k": 5}
    change(model, "generation_config.json", **generation)
    from_hf(model, tmp_path / "save", progress=False)
    to_hf(tmp_path / "save", Target(tmp_path / "back", format=format))
    to_hf(model, Target(tmp_path / "converted", format=format))
    for name in ("back", "converted"):
        back = json.loads((tmp_path / name / "config.json").read_text())
        assert {key: back[key] for key in ids} == ids
        read = GenerationConfig.from_pretrained(tmp_path / name)
        assert {key: getattr(read, key) for key in generation} == generation
        assert read.bos_token_id == 4


def test_a_folder_that_states_no_ids_has_those_that_transformers_takes(tmp_path: Path) -> None:
    _, model = export(tmp_path, "mixtral")
    config = json.loads((model / "config.json").read_text())
    assert config["eos_token_id"] is None  # an export without a tokenizer claims none
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    (model / "config.json").write_text(json.dumps({k: config[k] for k in config if k not in ids}))
    write_manifest(model)
    to_hf(model, Target(tmp_path / "ours"))
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    expected = MixtralConfig.from_pretrained(model)
    assert {name: ours[name] for name in ids} == {name: getattr(expected, name) for name in ids}


def test_words_of_generation_that_name_a_machine_or_a_hub_are_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, model = export(tmp_path, "mixtral")
    change(model, "generation_config.json", compile_config={"backend": "x"}, temperature=0.5)
    to_hf(model, Target(tmp_path / "ours"))
    kept = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert kept == {"temperature": 0.5}
    assert "generation_config.json has compile_config" in capsys.readouterr().err


@pytest.mark.parametrize("layers", [1, 3])
def test_a_mixtrals_balance_loss_is_ours_and_megatrons_at_their_scales(layers: int) -> None:
    """By the three formulas, with the same router in every layer, where they are the same."""
    coefficient, k, experts = 0.02, 3, 8
    theirs = MIXTRAL.to_format(
        model_config(
            num_experts=experts,
            num_experts_per_tok=k,
            num_hidden_layers=layers,
            mlp_layer_types=["sparse"] * layers,
        ),
        "float32",
    )
    config = MIXTRAL.from_format(theirs | {"router_aux_loss_coef": coefficient})
    logits_TE = torch.randn(20, experts, generator=torch.Generator().manual_seed(0))
    expected = coefficient * load_balancing_loss_func((logits_TE,) * layers, experts, k)
    probs_TE = logits_TE.softmax(-1)
    map_TE = torch.zeros(20, experts, dtype=torch.bool).scatter_(1, probs_TE.topk(k).indices, True)
    ours = DynMoEModelConfig.from_dict(config)
    loss = routing_loss(ours, probs_TE.unsqueeze(0), map_TE.unsqueeze(0), None)
    torch.testing.assert_close(layers * loss, expected)

    args = megatron_settings.args_from_config(config, "float32")
    assert args["moe_router_load_balancing_type"] == "aux_loss"
    # Megatron: coefficient * E * sum of f P, f divided by k, added up over the layers
    fractions_E, means_E = map_TE.float().mean(0) / k, probs_TE.mean(0)
    megatron = args["moe_aux_loss_coeff"] * experts * (fractions_E * means_E).sum()
    torch.testing.assert_close(layers * megatron, expected)


@pytest.mark.parametrize("coefficient", [0.0, 0.001, 0.02, 1 / 3])
@pytest.mark.parametrize("k", [2, 3, 4])  # a router of one expert cannot be trained by its weight
@pytest.mark.parametrize("layers", [1, 3, 7, 32])
def test_a_mixtrals_coefficient_comes_back_through_megatron(
    coefficient: float, layers: int, k: int
) -> None:
    none = MIXTRAL.to_format(
        model_config(
            num_hidden_layers=layers, num_experts_per_tok=k, mlp_layer_types=["sparse"] * layers
        ),
        "float32",
    )
    assert none["router_aux_loss_coef"] == 0  # said, or Mixtral would take 0.001
    config = MIXTRAL.from_format(none | {"router_aux_loss_coef": coefficient})
    args = Namespace(**megatron_settings.args_from_config(config, "float32"))
    trained = megatron_settings.config_from_megatron(args, config["vocab_size"], {})
    for source in (config, trained):
        back = MIXTRAL.to_format(source, "float32")["router_aux_loss_coef"]
        assert back == pytest.approx(coefficient, rel=1e-14)
        assert coefficient == 1 / 3 or back == coefficient


def test_another_scope_of_the_balance_loss_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = model_config(balance_loss="seq_aux_loss", balance_loss_coeff=0.005)
    write_megatron(tmp_path / "load", config)
    to_hf(tmp_path / "load", Target(tmp_path / "hf", format="mixtral"))
    assert "format mixtral has no word for balance_loss seq_aux_loss" in capsys.readouterr().err
    assert json.loads((tmp_path / "hf/config.json").read_text())["router_aux_loss_coef"] == 0.01


def test_several_ends_outlive_a_training_beside_a_tokenizer_that_knows_one(tmp_path: Path) -> None:
    """The tokenizer of the flags lies in the folder of the model, which says more."""
    tokenizer = make_tokenizer(tmp_path)
    config = model_config(vocab_size=VOCAB_SIZE)
    write_megatron(tmp_path / "load", config)
    model = tmp_path / "hf"
    to_hf(tmp_path / "load", Target(model, format="mixtral", tokenizer=tokenizer))
    end = json.loads((model / "config.json").read_text())["eos_token_id"]
    assert type(end) is int  # what the tokenizer knows
    change(model, eos_token_id=[end, 7])
    change(model, "generation_config.json", eos_token_id=[end, 8])
    from_hf(model, tmp_path / "save", progress=False)
    trained = {"tokenizer_model": str(model), "tokenizer_type": "HuggingFaceTokenizer"}
    write_megatron(tmp_path / "trained", config, **trained)  # without what from-hf noted
    for load in ("save", "trained"):
        back = tmp_path / f"{load}_hf"
        to_hf(tmp_path / load, Target(back, format="mixtral"))
        assert json.loads((back / "config.json").read_text())["eos_token_id"] == [end, 7]
        assert GenerationConfig.from_pretrained(back).eos_token_id == [end, 8]
