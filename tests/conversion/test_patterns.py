"""Models by --hybrid-layer-pattern that a GPTModel could be, to Hugging Face and back."""

from __future__ import annotations

import itertools
import json
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dynmoe.conversion.convert import FLAGS, Target, from_hf, to_hf
from megatron_dynmoe.conversion.megatron.checkpoint import MegatronCheckpoint
from megatron_dynmoe.conversion.megatron.settings import config_from_megatron
from megatron_dynmoe.settings.hybrid_pattern import adapt_pattern, as_whole_layers
from tests.conversion.checkpoints import (
    DTOP_P,
    NO_EXPERTS,
    TOP_K,
    megatron_tensors,
    model_config,
    write_megatron,
)

MIXED = {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}
EVERYTHING = {"attention_bias": True, "qk_norm": True, "tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DTop-p": ("*E*E", DTOP_P),
    "a dense layer": ("*E*-*E", DTOP_P | MIXED | EVERYTHING | {"intermediate_size": 10}),
    "a drawn target": (
        "*E*-*E",
        DTOP_P
        | MIXED
        | {"target_experts_per_token": "uniform(1.5,4)"}
        | {"controller": {"scope": "global"}},
    ),
    "top-k": ("*E*E", TOP_K | {"shared_expert_intermediate_size": 10}),
    "no experts": ("*-*-", NO_EXPERTS),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict[str, Any]]:
    """A pattern, the checkpoint of such a model, and its settings."""
    pattern, settings = MODELS[request.param]
    config = model_config(**settings)
    return pattern, write_megatron(tmp_path / "load", config, has_pattern=True), config


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_the_export_is_that_of_the_same_model_without_a_pattern(model, tmp_path: Path) -> None:
    pattern, load, config = model
    assert MegatronCheckpoint(load).args.hybrid_layer_pattern == pattern
    to_hf(load, Target(tmp_path / "one"))
    to_hf(write_megatron(tmp_path / "gpt", config), Target(tmp_path / "other"))
    one, other = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "other"))
    assert one == other
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_round_trip_is_exact(model, tmp_path: Path) -> None:
    pattern, load, _ = model
    to_hf(load, Target(tmp_path / "hf"))
    from_hf(tmp_path / "hf", tmp_path / "back", has_pattern=True, progress=False)
    before, after = megatron_tensors(load), megatron_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    saved, again = (MegatronCheckpoint(folder).args for folder in (load, tmp_path / "back"))
    for name in ("hybrid_layer_pattern", "num_layers", "moe_layer_freq"):
        assert getattr(again, name) == getattr(saved, name), name
    # The flags say the same model: Megatron and the loop take the layers from the pattern.
    flags = shlex.split((tmp_path / "back" / FLAGS).read_text())
    assert flags[flags.index("--hybrid-layer-pattern") + 1] == pattern
    assert "--moe-layer-freq" not in flags
    named = dict(itertools.pairwise(flags))
    given = {
        **{"hybrid_layer_pattern": pattern, "hybrid_override_pattern": None},
        **{"num_layers": int(named["--num-layers"]), "pipeline_model_parallel_size": 1},
        **{"num_experts": int(named.get("--num-experts", 0)) or None, "moe_layer_freq": 1},
        **{"multi_latent_attention": False, "use_rope_scaling": False, "mtp_num_layers": None},
        "position_embedding_type": named["--position-embedding-type"],
    }
    args = Namespace(**given)
    adapt_pattern(args)
    assert args.moe_layer_freq == saved.moe_layer_freq


def test_attention_and_mlps_are_layers_of_their_own(tmp_path: Path) -> None:
    """Names as Megatron's HybridModel saves them, by hand."""
    load = write_megatron(tmp_path, model_config(**DTOP_P | MIXED), has_pattern=True)
    found = megatron_tensors(load)
    assert {
        *("decoder.final_norm.weight", "decoder.layers.0.self_attention.linear_proj.weight"),
        *("decoder.layers.1.mlp.router.weight", "decoder.layers.1.mlp.router.threshold"),
        *("decoder.layers.2.input_layernorm.weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
        *("decoder.layers.3.mlp.linear_fc1.weight", "decoder.layers.5.mlp.router.theta_offset"),
        "decoder.layers.5.mlp.experts.experts.linear_fc2.weight",
    } <= found.keys()
    assert not [key for key in found if "final_layernorm" in key or "layers.6" in key]


@pytest.mark.parametrize("pattern", ["*EE", "E*", "**E", "*E*", "*M*E", "", 7])
def test_other_patterns_are_in_no_format(tmp_path: Path, pattern: Any) -> None:
    args = Namespace(hybrid_layer_pattern=pattern, num_layers=3, num_experts=4)
    assert as_whole_layers(args) is args
    said = r"hybrid_layer_pattern is .* \(layers that are not attention and an MLP in turn\)"
    with pytest.raises(ValueError, match=said):
        config_from_megatron(args, 8, {})


def test_stages_do_not_matter() -> None:
    args = Namespace(
        hybrid_layer_pattern="*E*|-*E", num_layers=6, moe_layer_freq=[0, 1, 0, 0, 0, 1]
    )
    assert vars(as_whole_layers(args)) == {
        **{"hybrid_layer_pattern": None, "num_layers": 3, "moe_layer_freq": [1, 0, 1]}
    }
