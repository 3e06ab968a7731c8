"""The model's configuration: what it refuses, and that it is written and read back exactly."""

import copy
import dataclasses
import json
from fractions import Fraction

import pytest
from transformers import GenerationConfig, PreTrainedConfig

from megatron_dynmoe.huggingface import DynMoEModelConfig
from megatron_dynmoe.huggingface.configuration_dynmoe import ROUTING_DEFAULTS
from megatron_dynmoe.huggingface.validation_dynmoe import ROUTING_NAMES
from megatron_dynmoe.layers.rules import LAYER_RULES
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.routings import ROUTINGS as TRAINED
from tests.huggingface.tiny import tiny_config

DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"], "intermediate_size": 48}

REFUSED = [
    ({"threshold": 1.5}, ["threshold is 1.5", "0 (one expert) to 1"]),
    ({"threshold": -0.1}, ["threshold is -0.1"]),
    ({"threshold": float("nan")}, ["threshold is nan"]),
    ({"threshold": "0.4"}, ["threshold is '0.4'"]),
    ({"threshold": [0.4, 1.01, 0.4]}, ["threshold[1] is 1.01"]),
    ({"threshold": [0.4, 0.4]}, ["threshold is [0.4, 0.4]", "each of the 3 layers"]),
    ({"threshold": [0.4, None, 0.4]}, ["threshold[1] is None"]),
    ({"threshold": [0.4, 0.4, 0.4], **DENSE_FIRST}, ["threshold[0] is 0.4", "layer 0 is dense"]),
    ({"routing": "dtop_p"}, ["threshold is None"]),
    ({"inference_threshold": 2}, ["inference_threshold is 2"]),
    ({"routing": "topk"}, ["routing is 'topk'", "top_k or top_p or dtop_p"]),
    ({"normalization": "rms"}, ["normalization is 'rms'"]),
    ({"weights": "sum"}, ["weights is 'sum'"]),
    ({"router_dtype": "float64"}, ["router_dtype is 'float64'"]),
    ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "silu"]),
    ({"balance_loss": "z_loss"}, ["balance_loss is 'z_loss'"]),
    ({"balance_loss_coeff": -1}, ["balance_loss_coeff is -1"]),
    ({"routing": "top_k"}, ["num_experts_per_tok is None", "1 to 8"]),
    ({"routing": "top_k", "num_experts_per_tok": 9}, ["num_experts_per_tok is 9", "1 to 8"]),
    ({"routing": "top_k", "num_experts_per_tok": 0}, ["num_experts_per_tok is 0"]),
    (
        {"routing": "top_k", "num_experts_per_tok": 2, "threshold": 0.4},
        ["threshold is 0.4", "'top_k' does not have"],
    ),
    ({"num_experts_per_tok": 2}, ["num_experts_per_tok is 2", "max_experts_per_token"]),
    ({"max_experts_per_token": 9}, ["max_experts_per_token is 9", "1 to 8"]),
    ({"inference_max_experts_per_token": 0}, ["inference_max_experts_per_token is 0"]),
    ({"theta": [1.0, 1.0, 1.0]}, ["theta is given", "'drn'"]),
    ({"normalization": "drn", "theta": [1.0]}, ["theta is [1.0]", "each of the 3 layers"]),
    ({"normalization": "drn", "theta": [1.0, "x", 1.0]}, ["theta[1] is 'x'"]),
    ({"measured_experts_per_token": [2.0]}, ["measured_experts_per_token is [2.0]"]),
    ({"mlp_layer_types": ["sparse"]}, ["mlp_layer_types is ['sparse']", "3 layers"]),
    ({"mlp_layer_types": ["sparse", "moe", "dense"]}, ["mlp_layer_types[1] is 'moe'"]),
    ({"mlp_layer_types": ["dense"] * 3}, ["intermediate_size is None", "layer 0 is dense"]),
    ({"num_key_value_heads": 3}, ["num_key_value_heads is 3", "divisor"]),
    ({"num_experts": 0}, ["num_experts is 0"]),
    ({"shared_expert_gate": True}, ["shared_expert_intermediate_size"]),
    ({"rope_parameters": {"rope_type": "yarm"}}, ["rope_type 'yarm'", "or yarn"]),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_what_makes_no_sense_is_refused_by_name(settings, said):
    with pytest.raises(ValueError) as error:
        tiny_config(**settings)
    for words in said:
        assert words in str(error.value)


def test_a_misspelled_setting_is_mentioned():
    with pytest.warns(UserWarning, match="'threshhold', which .* did you mean 'threshold'"):
        config = tiny_config(threshhold=0.9)  # codespell:ignore
    assert config.threshold == 0.4


def test_what_transformers_writes_passes_in_silence(tmp_path, recwarn):
    fields = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    others = {"torch_dtype": "float32", "of_a_later_version": [1], **GenerationConfig().to_dict()}
    theirs = dict.fromkeys(fields - {"num_labels", "id2label", "label2id"}) | others
    tiny_config(**theirs).save_pretrained(tmp_path)
    assert DynMoEModelConfig.from_pretrained(tmp_path).of_a_later_version == [1]
    assert not [warning for warning in recwarn if "no setting" in str(warning.message)]


def test_a_threshold_set_later_is_checked_too():
    config = tiny_config()
    config.threshold = 1.5
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        config.threshold_and_cap(layer=0, training=False)


def test_every_field_survives_its_file_exactly(tmp_path):
    tenth = 0.1 + 0.2  # 0.30000000000000004: the shortest text that reads back as it
    config = tiny_config(
        routing="dtop_p",
        threshold=[None, tenth, 1 / 3],
        theta=[None, 1.5, 0.1 + 0.7],
        max_experts_per_token=5,
        inference_threshold=2 / 3,
        inference_max_experts_per_token=2,
        target_experts_per_token="0:8,1000:2",
        controller={"scope": "layer", "integral": [None, 1e-17, -3.3e-5]},
        measured_experts_per_token=[None, 2.0000000000000004, 1.9],
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
        shared_expert_intermediate_size=24,
        shared_expert_gate=True,
        tie_word_embeddings=True,
        qk_norm=True,
        **DENSE_FIRST,
    )
    config.save_pretrained(tmp_path)
    loaded = DynMoEModelConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert Fraction(loaded.threshold[1]) == Fraction(tenth)
    again = DynMoEModelConfig.from_json_file(tmp_path / "config.json")
    assert again.to_json_string() == config.to_json_string()


def test_the_file_states_every_routing_setting(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    stated = {
        "routing": "top_p",
        "threshold": 0.4,
        "normalization": "none",
        "weights": "raw",
        "router_dtype": "float32",
        "max_experts_per_token": None,
        "balance_loss_coeff": 0.01,
    }
    assert stated.items() <= written.items()


def test_the_routings_are_those_that_training_calls_exported():
    assert tuple(name for name, kind in TRAINED.items() if kind.is_exported) == ROUTING_NAMES


@pytest.mark.parametrize("routing", ["top_p", "dtop_p"])
def test_defaults_are_those_of_training(routing):
    settings = {"routing": routing}
    if routing == "dtop_p":
        settings["target_experts_per_token"] = 2
    training = DynMoEConfig(**settings).resolve(num_experts=8)
    config = tiny_config(routing=routing, threshold=training.threshold or 0.3)
    for name in ("normalization", "weights", "balance_loss", "balance_loss_coeff"):
        assert getattr(config, name) == getattr(training, name)
    assert config.dynamic_loss_coeff == training.dynamic_loss_coeff
    assert config.threshold == (training.threshold or 0.3)


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        ({"routing": "top_k", "num_experts_per_tok": 2}, 2),
        ({}, 8),
        ({"max_experts_per_token": 3}, 3),
        ({"max_experts_per_token": 3, "inference_max_experts_per_token": 2}, 2),
        ({"mlp_layer_types": ["dense"] * 3, "intermediate_size": 48}, None),
    ],
)
def test_engines_read_how_many_slots_a_token_needs(settings, slots, tmp_path):
    """But the file keeps what was set, and so does a copy."""
    config = tiny_config(**settings)
    config.save_pretrained(tmp_path)
    for one in (config, DynMoEModelConfig.from_pretrained(tmp_path), copy.deepcopy(config)):
        assert one.num_experts_per_tok == slots
        assert one.to_dict()["num_experts_per_tok"] == settings.get("num_experts_per_tok")


@pytest.mark.parametrize(
    ("settings", "training", "expected"),
    [
        ({"threshold": 0.5}, False, (0.5, None)),
        ({"threshold": [0.1, 0.2, 0.3]}, False, (0.2, None)),
        ({"max_experts_per_token": 3}, True, (0.4, 3)),
        ({"max_experts_per_token": 3}, False, (0.4, 3)),
        ({"max_experts_per_token": 3, "inference_max_experts_per_token": 2}, False, (0.4, 2)),
        ({"max_experts_per_token": 3, "inference_max_experts_per_token": 2}, True, (0.4, 3)),
        ({"inference_threshold": 0.9}, False, (0.9, None)),
        ({"inference_threshold": 0.0}, False, (0.0, None)),
        ({"inference_threshold": 0.9}, True, (0.4, None)),
    ],
)
def test_inference_has_a_threshold_and_a_cap_of_its_own(settings, training, expected):
    assert tiny_config(**settings).threshold_and_cap(layer=1, training=training) == expected


RELU = {
    "routing": "relu",
    "rule_settings": {"control_law": "pi"},
    "router_state": {"log10_lambda": [[-3.0], [-3.0]]},
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalization": "drn"}, "normalization is 'drn', and routing 'relu' knows 'none' only"),
        ({"weights": "renormalized"}, "weights is 'renormalized', .* knows 'raw' only"),
        ({"threshold": 0.3}, "threshold is 0.3, which routing 'relu' does not have"),
        ({"router_state": {"log10_lambda": [[-3.0], [1, 2]]}}, r"log10_lambda'\]\[1\] is \[1, 2\]"),
        ({"router_state": {}}, "router_state has nothing, and routing 'relu' has log10_lambda"),
    ],
)
def test_settings_of_a_rule_are_refused_by_name(settings, message):
    DynMoEModelConfig(num_hidden_layers=2, **RELU)
    with pytest.raises(ValueError, match=message):
        DynMoEModelConfig(num_hidden_layers=2, **RELU | settings)


def test_a_rule_has_the_defaults_of_its_training():
    for routing, kind in TRAINED.items():
        if routing not in LAYER_RULES:
            continue
        found = ROUTING_DEFAULTS[routing]
        for name in ("normalization", "weights", "balance_loss"):
            wanted = kind.defaults.get(name, LAYER_RULES[routing].fixed.get(name))
            assert found[name] == wanted, (routing, name)
