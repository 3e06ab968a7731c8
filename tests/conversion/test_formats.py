"""What each format expresses, to the bit, and what it refuses, by the setting's name."""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megatron_dynmoe.conversion.convert import Target, from_hf, to_hf
from megatron_dynmoe.conversion.formats import FORMATS, OURS, format_named, format_of
from megatron_dynmoe.conversion.megatron import settings as megatron_settings
from megatron_dynmoe.conversion.model_settings import check_config
from megatron_dynmoe.conversion.routing_settings import router_state
from tests.conversion.checkpoints import (
    DTOP_P,
    EXAMPLES,
    NO_EXPERTS,
    TOP_K,
    TOP_P,
    can_hold,
    megatron_tensors,
    model_config,
    write_megatron,
)

# Each makes every format that has it, or ours alone, carry something of its own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"plain {name}": (name, EXAMPLES[name]) for name in FORMATS},
    "grouped queries": ("mixtral", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "one key for all": ("mixtral", {"num_key_value_heads": 1}),
    "wide heads": ("mixtral", {"head_dim": 10}),
    "one layer, one expert": (
        "qwen3-moe",
        {
            **{"num_hidden_layers": 1, "num_experts": 1, "num_experts_per_tok": 1},
            **{"weights": "raw", "qk_norm": True},
        },
    ),
    "tied mixtral": ("mixtral", {"tie_word_embeddings": True}),
    "a vocabulary of 1": ("dynamic-moe", TOP_P | {"vocab_size": 1}),
    "a prime vocabulary": ("dynamic-moe", TOP_P | {"vocab_size": 4099}),
    "every second layer dense": (
        "dynamic-moe",
        TOP_P | {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
    "dense layers of another size": (
        "dynmoe",
        DTOP_P | {"mlp_layer_types": ["dense", "sparse"], "intermediate_size": 10},
    ),
    "grouped queries, wide heads, and a dense layer of another size": (
        "qwen3-moe",
        {
            **{"qk_norm": True, "num_key_value_heads": 1, "head_dim": 10},
            **{"mlp_layer_types": ["sparse", "dense"], "intermediate_size": 10},
        },
    ),
    "raw weights, tied": (
        "qwen3-moe",
        {"qk_norm": True, "weights": "raw", "tie_word_embeddings": True},
    ),
    "grouped queries, tied llama": (
        "llama",
        NO_EXPERTS | {"num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": True},
    ),
    "a drawn target": (
        "dynmoe",
        DTOP_P
        | {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}
        | {"target_experts_per_token": "uniform(1.5,4)", "controller": {"scope": "global"}},
    ),
    "thresholds of layers": (
        "dynmoe",
        TOP_P
        | {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}
        | {"routing": "seq_top_k", "threshold": None, "target_experts_per_token": 1.5}
        | {"router_state": {"score_threshold": [[0.3], None, [0.1]]}},
    ),
    "raw weights of top-k": ("dynmoe", {"weights": "raw"}),
    "renormalized top-p": ("dynmoe", TOP_P | {"weights": "renormalized"}),
    "shared expert": ("dynmoe", {"shared_expert_intermediate_size": 10}),
    "gated shared expert": (
        "dynmoe",
        TOP_P | {"shared_expert_intermediate_size": 10, "shared_expert_gate": True},
    ),
    "biases, norms, tied": (
        "dynmoe",
        DTOP_P | {"attention_bias": True, "qk_norm": True, "tie_word_embeddings": True},
    ),
    "no experts": ("dynmoe", NO_EXPERTS),
    "null slots": (
        "dynmoe",
        DTOP_P
        | {"routing": "null_experts", "normalization": "none", "threshold": None}
        | {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}
        | {
            "max_experts_per_token": 3,
            "inference_max_experts_per_token": 2,
            "rule_settings": {"null_slots": 5, "null_kind": "identity"},
            "router_state": {
                "share": [[0.125], None, [0.125]],
                "null_bias": [[0.5], None, [-1.25]],
            },
        },
    ),
    "gates": (
        "dynmoe",
        DTOP_P
        | {"routing": "relu", "normalization": "none", "weights": "raw", "theta": None}
        | {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}
        | {"balance_loss_coeff": 0.0, "dynamic_loss_coeff": 0.0, "threshold": None}
        | {
            "rule_settings": {"control_law": "sign"},
            "router_state": {"log10_lambda": [[-3.5], None, [-3.5]]},
            "controller": {
                "scope": "global",
                "proportional_gain": 0.0,
                "integral_gain": 0.125,
                "initial_threshold": -8.0,
                "min_threshold": -16.0,
                "max_threshold": 2.0,
            },
        },
    ),
    "expert thresholds": (
        "dynmoe",
        DTOP_P
        | {"routing": "expert_threshold", "normalization": "none", "weights": "raw"}
        | {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}
        | {
            "threshold": None,
            "rule_settings": {"threshold_decay": 0.9},
            "router_state": {
                "share": [[0.25], None, [0.25]],
                "thresholds": [[0.5, 0.25, -0.5, 0.125], None, [2.0, 1.0, 0.0, -1.0]],
                "batches": [[17.0], None, [17.0]],
            },
        },
    ),
}


def hf_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same bits of the same types; NaN included."""
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8)), key


def with_odd_numbers(shape: Any, generator: torch.Generator) -> Tensor:
    """Random bits would do as weights: here NaN, infinities, -0 and subnormals among them."""
    tensor = torch.randn(shape, generator=generator)
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-41])
    flat = tensor.view(-1)
    flat[: min(len(odd), flat.numel())] = odd[: flat.numel()]
    return tensor


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("name", MODELS)
def test_round_trips_are_exact(tmp_path: Path, name: str, dtype: str) -> None:
    format, settings = MODELS[name]
    # The state of the controller is read as numbers, which NaN would not be.
    make = with_odd_numbers if settings.get("normalization") != "drn" else torch.randn
    config = model_config(**settings)
    load = write_megatron(tmp_path / "load", config, dtype, make=make)
    shards = {"max_shard_size": 2000, "format": format}
    to_hf(load, Target(tmp_path / "hf", **shards))
    from_hf(tmp_path / "hf", tmp_path / "back", progress=False)
    to_hf(tmp_path / "back", Target(tmp_path / "again", **shards))
    assert_same(megatron_tensors(load), megatron_tensors(tmp_path / "back"))
    assert_same(hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "again"))
    configs = [json.loads((tmp_path / x / "config.json").read_text()) for x in ("hf", "again")]
    assert configs[0] == configs[1]
    assert configs[0].get("dtype", configs[0].get("torch_dtype")) == dtype


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_becomes_ours_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    format, settings = MODELS[name]
    load = write_megatron(tmp_path / "load", model_config(**settings))
    to_hf(load, Target(tmp_path / "hf", format=format))
    to_hf(tmp_path / "hf", Target(tmp_path / "ours"))
    to_hf(tmp_path / "ours", Target(tmp_path / "again", format=format))
    from_hf(tmp_path / "ours", tmp_path / "back", progress=False)
    told = capsys.readouterr().err.splitlines()
    assert all("no tokenizer is in" in line for line in told)  # nothing is left out
    to_hf(load, Target(tmp_path / "direct"))
    assert_same(hf_tensors(tmp_path / "ours"), hf_tensors(tmp_path / "direct"))
    assert_same(hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "again"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_casts_are_those_of_torch(tmp_path: Path, format: str, dtype: str) -> None:
    config = model_config(**EXAMPLES[format])
    load = write_megatron(tmp_path / "load", config, "float32")
    to_hf(load, Target(tmp_path / "as_it_is", format=format))
    to_hf(load, Target(tmp_path / "cast", format=format, dtype=dtype))
    kept = hf_tensors(tmp_path / "as_it_is")
    expected = {
        key: x if key.endswith("inv_freq") else x.to(getattr(torch, dtype))
        for key, x in kept.items()
    }
    assert_same(hf_tensors(tmp_path / "cast"), expected)


LARGE = {
    "model.embed_tokens.weight": (13, 8),
    "model.layers.0.mlp.experts.down_proj, expert 0,": (8, 6),
    "decoder.layers.0.mlp.router.theta_offset": (1,),  # read for config.json, too
}


@pytest.mark.parametrize("key", LARGE)
@pytest.mark.parametrize(("dtype", "value"), [("float16", -7e4), ("bfloat16", 3.4e38)])
def test_a_value_that_a_cast_makes_infinite_is_refused(
    tmp_path: Path, key: str, dtype: str, value: float
) -> None:
    def make(shape: Any, generator: torch.Generator) -> Tensor:
        tensor = torch.randn(shape, generator=generator)
        tensor.view(-1)[-1] = value if tuple(shape) == LARGE[key] else tensor.view(-1)[-1]
        return tensor

    load = write_megatron(tmp_path / "load", model_config(**DTOP_P), "float32", make=make)
    to_hf(load, Target(tmp_path / "as_it_is"))
    with pytest.raises(ValueError, match=rf"^{re.escape(key)} holds .*, and {dtype} goes to"):
        to_hf(load, Target(tmp_path / "cast", dtype=dtype))
    assert not (tmp_path / "cast").exists()


def test_an_infinite_value_stays_what_it_is(tmp_path: Path) -> None:
    config = model_config(**TOP_P)
    load = write_megatron(tmp_path / "load", config, "float32", make=with_odd_numbers)
    to_hf(load, Target(tmp_path / "cast", dtype="float16"))


# Other values of each setting that a format may not be able to express.
OTHERWISE: dict[str, tuple[dict[str, Any], ...]] = {
    "routing": (DTOP_P, TOP_P),
    "normalization": ({"normalization": "drn"},),
    "weights": ({"weights": "raw"}, {"weights": "renormalized"}),
    "max_experts_per_token": ({"max_experts_per_token": 3},),
    "inference_max_experts_per_token": ({"inference_max_experts_per_token": 3},),
    "inference_threshold": ({"inference_threshold": 0.2},),
    "inference_experts_per_token": (
        {
            "inference_experts_per_token": 2,
            "budget_curve": [{"experts_per_token": 2, "threshold": 0.2, "loss": None}],
        },
    ),
    "rope_theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},),
    "partial_rotary_factor": (
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "rope_type": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},),
    "attention_bias": ({"attention_bias": True}, {"attention_bias": False}),
    "qk_norm": ({"qk_norm": True}, {"qk_norm": False}),
    "shared_expert_intermediate_size": ({"shared_expert_intermediate_size": 3},),
    "tie_word_embeddings": ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
    "threshold": ({"threshold": [0.3, 0.4]},),
    "num_key_value_heads": ({"num_key_value_heads": 1},),
    "head_dim": ({"head_dim": 6},),
    "mlp_layer_types": ({"mlp_layer_types": ["dense", "sparse"]},),
    "num_experts": (NO_EXPERTS, TOP_K | {"num_experts": 4}),
    "intermediate_size": ({"intermediate_size": 7, "mlp_layer_types": ["sparse", "dense"]},),
}


@pytest.mark.parametrize(
    ("format", "name"),
    [
        (format, entry.name)
        for format, record in FORMATS.items()
        for entry in (*record.needed, *record.limits)
    ],
)
def test_a_format_refuses_what_it_cannot_express(format: str, name: str) -> None:
    refusals = 0
    for other in OTHERWISE[name]:
        config = model_config(**EXAMPLES[format] | other)
        try:
            FORMATS[format].to_format(config, "float32")
        except ValueError as error:
            refusals += 1
            assert re.match(f"format {format} cannot express {name} .*--format dynmoe", str(error))
        assert OURS.to_format(config, "float32")["model_type"] == "dynmoe"
    assert refusals > 0
    FORMATS[format].to_format(model_config(**EXAMPLES[format]), "float32")


def test_a_folder_is_of_one_format() -> None:
    for name, format in FORMATS.items():
        theirs = format.to_format(model_config(**EXAMPLES[name]), "float32")
        assert [other.name for other in FORMATS.values() if other.recognizes(theirs)] == [name]
        assert format_of(theirs) is format


def test_what_is_of_no_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format is 'mixtrl': use one of dynmoe, "):
        format_named("mixtrl")
    load = write_megatron(tmp_path / "load", model_config())
    with pytest.raises(ValueError, match="mixtrl"):
        to_hf(load, Target(tmp_path / "hf", format="mixtrl"))
    with pytest.raises(ValueError, match=r"model_type is 'gpt2' and architectures None: .*dynmoe"):
        format_of({"model_type": "gpt2"})


def test_the_docs_have_a_cell_for_each_line_of_each_format() -> None:
    for format in FORMATS.values():
        assert list(format.column) == list(OURS.column), format.name


@pytest.mark.parametrize("needed", megatron_settings.NEEDED_OF_MEGATRON, ids=lambda n: n.name)
def test_what_no_format_has_is_refused(tmp_path: Path, needed: Any) -> None:
    other = {True: False, False: True}.get(needed.value, "something else")
    load = write_megatron(tmp_path / "load", model_config(), **{needed.name: other})
    with pytest.raises(ValueError, match=rf"{needed.name} is .*which no format has"):
        to_hf(load, Target(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_megatrons_flags_of_a_model_with_dense_layers() -> None:
    """They are pasted by $(cat ...), where a quote would reach Megatron as part of the value."""
    kinds = ["dense", "sparse", "sparse"]
    config = model_config(num_hidden_layers=3, mlp_layer_types=kinds)
    flags = " ".join(megatron_settings.training_flags(config, "float32")).split()
    assert flags[flags.index("--moe-layer-freq") + 1] == "[0,1,1]"
    assert not {"'", '"', "$", ";"} & set("".join(flags))


# Random settings ----------------------------------------------------------------------------------


@st.composite
def settings_of(draw: st.DrawFn, format: str) -> dict[str, Any]:
    """A config that a format can hold: of what follows, whatever it can."""
    count, rate = st.integers(1, 9), st.floats(0, 1)
    heads = draw(count)
    layers = draw(count)
    settings = EXAMPLES[format] | {
        "vocab_size": draw(st.integers(1, 10**6)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 4,
        "hidden_size": 4 * heads,
        "max_position_embeddings": draw(st.integers(1, 10**6)),
        "initializer_range": draw(st.floats(1e-4, 1)),
        "rms_norm_eps": draw(st.floats(1e-9, 1e-3)),
    }
    groups = [g for g in range(1, heads + 1) if heads % g == 0]
    every = draw(st.integers(1, 3))
    for more in (
        {"num_key_value_heads": draw(st.sampled_from(groups))},
        {"head_dim": 2 * draw(count)},
        {"tie_word_embeddings": draw(st.booleans())},
        {"attention_dropout": draw(rate)},
        {"num_experts": draw(st.integers(4, 9))},
        {"num_experts_per_tok": draw(st.integers(2, 4))},
        {"rope_parameters": {"rope_type": "default", "rope_theta": draw(st.floats(1, 1e9))}},
        {"mlp_layer_types": ["dense" if i % every else "sparse" for i in range(layers)]},
        {"threshold": draw(st.floats(0, 1, width=32).map(lambda x: float(f"{x:.6g}")))},
        {"intermediate_size": draw(count)},
        {"inference_threshold": draw(st.none() | rate)},
        {"max_experts_per_token": draw(st.none() | st.integers(2, 4))},
        {"weights": draw(st.sampled_from(("raw", "renormalized")))},
        {"normalization": draw(st.sampled_from(("none", "drn")))},
        {"target_experts_per_token": draw(st.sampled_from((2.0, 1.5, "0:2,100:1.5")))},
    ):
        if can_hold(FORMATS[format], model_config(**settings | more)):
            settings |= more
    return settings


@pytest.mark.slow
@given(st.data(), st.sampled_from(tuple(FORMATS)))
def test_settings_come_back_from_every_format(data: st.DataObject, format: str) -> None:
    config = model_config(**data.draw(settings_of(format)))
    record = FORMATS[format]
    written = json.loads(json.dumps(record.to_format(config, "float32")))
    back = record.from_format(written)
    again = json.loads(json.dumps(record.to_format(back, "float32")))
    assert again.items() >= written.items()
    for name in config.keys() - {"threshold", "theta", "measured_experts_per_token"}:
        assert back[name] == config[name], name
    assert router_state(back)["threshold"] == router_state(config)["threshold"]


@pytest.mark.slow
@given(st.data(), st.sampled_from(tuple(FORMATS)))
def test_settings_come_back_from_megatron(data: st.DataObject, format: str) -> None:
    config = check_config(model_config(**data.draw(settings_of(format))))
    rope = config["rope_parameters"]
    rope["rope_theta"] = float(int(rope["rope_theta"]))  # Megatron's is a whole number
    args = Namespace(**megatron_settings.args_from_config(config, "float32"))
    state = router_state(config) | {"theta": config["theta"]}
    back = megatron_settings.config_from_megatron(args, config["vocab_size"], state)
    assert back["mlp_layer_types"] == config["mlp_layer_types"]
    for name in ("num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "weights"):
        assert back[name] == config[name], name
    for name in ("max_experts_per_token", "inference_threshold", "target_experts_per_token"):
        assert back[name] == config[name], name
