"""Saving and loading the Transformers model, with the package and without it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_dynmoe.huggingface import DynMoEForCausalLM, DynMoEModelConfig
from megatron_dynmoe.huggingface.shipping import SHIPPED
from tests.huggingface.tiny import tiny_model, tokens

# Of equal weights: what is loaded may lie beside a 64-byte boundary, where some processors' kernels
# add up in another order.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
DTOP_P = {"routing": "dtop_p", "threshold": [0.3, 0.4, 0.5]}


def with_theta(model, *theta):
    with torch.no_grad():
        for layer, value in zip(model.model.layers, theta, strict=True):
            layer.mlp.router.theta_offset.fill_(value - 1)
    return model


def assert_same_weights(one, other):
    weights, others = one.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, tied):
    model, ids = tiny_model(**DTOP_P, tie_word_embeddings=tied), tokens(2, 9)
    with_theta(model, 1.5, 0.7, 1.25)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DynMoEForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is DynMoEModelConfig
    assert_same_weights(loaded, model)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **ROUNDING)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    base = AutoModel.from_pretrained(tmp_path)
    assert_same_weights(base, model.model)
    hidden = base(ids).last_hidden_state
    torch.testing.assert_close(loaded.lm_head(hidden), model(ids).logits, **ROUNDING)


def test_the_names_on_disk(tmp_path):
    tiny_model(
        **DTOP_P,
        attention_bias=True,
        qk_norm=True,
        shared_expert_intermediate_size=24,
        shared_expert_gate=True,
        mlp_layer_types=["sparse"] * 3,
    ).save_pretrained(tmp_path)
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "model.safetensors").items()}
    names = [re.sub(r"layers\.\d", "layers.i", name) for name in shapes]
    assert len(names) == 3 + 3 * 19
    layer = {k.removeprefix("model.layers.1."): v for k, v in shapes.items() if "layers.1." in k}
    assert layer == {
        "input_layernorm.weight": (32,),
        "post_attention_layernorm.weight": (32,),
        "self_attn.q_proj.weight": (32, 32),
        "self_attn.q_proj.bias": (32,),
        "self_attn.k_proj.weight": (16, 32),
        "self_attn.k_proj.bias": (16,),
        "self_attn.v_proj.weight": (16, 32),
        "self_attn.v_proj.bias": (16,),
        "self_attn.o_proj.weight": (32, 32),
        "self_attn.q_norm.weight": (8,),
        "self_attn.k_norm.weight": (8,),
        "mlp.router.weight": (8, 32),
        "mlp.router.theta_offset": (1,),
        "mlp.experts.gate_up_proj": (8, 32, 32),
        "mlp.experts.down_proj": (8, 32, 16),
        "mlp.shared_expert.gate_proj.weight": (24, 32),
        "mlp.shared_expert.up_proj.weight": (24, 32),
        "mlp.shared_expert.down_proj.weight": (32, 24),
        "mlp.shared_expert_gate.weight": (1, 32),
    }


def test_a_new_model_takes_theta_from_its_config_and_saving_writes_it_back(tmp_path):
    model = tiny_model(**DTOP_P, theta=[1.5, 0.75, 2.0])
    assert model.theta == [1.5, 0.75, 2.0]
    assert [layer.mlp.router.theta_offset.item() for layer in model.model.layers] == [0.5, -0.25, 1]
    with_theta(model, 1.25, 1.0, 0.5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["theta"] == [1.25, 1.0, 0.5]


def test_the_weights_theta_wins_and_a_difference_is_said(tmp_path, caplog):
    with_theta(tiny_model(**DTOP_P), 1.5, 0.7, 1.25).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "theta" not in caplog.text

    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"theta": [1.5, 3.0, 1.25]}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    said = caplog.text
    assert "theta[1] is 3 in the config and 0.7 in the weights: the weights are used" in said
    assert "theta[0]" not in said
    assert loaded.config.theta == loaded.theta
    assert loaded.theta[1] == pytest.approx(0.7)


PLACES = {
    "cpu": "cpu",
    "all on the disk": {"": "disk"},
    "some on the disk": {
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
    }
    | dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu"),
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_model_is_the_same_and_saved_again_complete(tmp_path, caplog, places, tied):
    model, ids = tiny_model(**DTOP_P, tie_word_embeddings=tied), tokens(2, 9)
    with_theta(model, 1.5, 0.7, 1.25).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"theta": [1.5, 0.7, 3.0]}))  # the last is on the disk
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=PLACES[places], offload_folder=tmp_path / "offloaded"
    )
    assert "theta[2] is 3 in the config and 1.25 in the weights" in caplog.text
    assert loaded.theta == loaded.config.theta == model.theta
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["theta"] == model.theta


def test_theta_of_a_model_whose_weights_are_elsewhere():
    model = with_theta(tiny_model(**DTOP_P), 1.5, 0.7, 1.25)
    there = model.theta
    accelerate.cpu_offload(model)
    assert model.model.layers[0].mlp.router.theta_offset.is_meta
    assert model.theta == there
    with torch.device("meta"):  # a model without numbers, as accelerate's estimates make it
        assert DynMoEForCausalLM(model.config).theta is None
        model.config.theta = there
        assert DynMoEForCausalLM(model.config).theta == there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_theta_to_a_shorter_type_is_no_difference(tmp_path, caplog, dtype):
    with_theta(tiny_model(**DTOP_P), 1.53, 0.71, 1.0001).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert "theta" not in caplog.text
    assert loaded.dtype == loaded.model.layers[0].mlp.router.theta_offset.dtype == dtype
    router = loaded.model.layers[2].mlp.router
    assert router.theta.dtype == torch.float32
    assert 1 < router.theta.item() < 1.0002  # which bfloat16 itself cannot hold


def test_a_bad_threshold_in_the_file_stops_the_loading(tmp_path):
    tiny_model(**DTOP_P).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"threshold": [0.3, 1.7, 0.5]}))
    with pytest.raises(ValueError, match=r"threshold\[1\] is 1\.7"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_weights_are_initialized_and_named(tmp_path):
    model = tiny_model(**DTOP_P)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.experts.down_proj"]
    save_file(weights, path, metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.1.mlp.experts.down_proj"}
    fresh = loaded.model.layers[1].mlp.experts.down_proj
    assert 0.2 < fresh.std() < 0.4  # initializer_range is 0.3
    kept = loaded.model.layers[0].mlp.experts.down_proj
    assert torch.equal(kept, model.model.layers[0].mlp.experts.down_proj)


LOAD_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["megatron_dynmoe"] = None  # importing it is an error
import torch
from transformers import AutoModelForCausalLM
folder, ids, output, saved = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
outputs = model(torch.load(ids), output_router_logits=True)
text = model.generate(torch.load(ids), max_new_tokens=5, do_sample=False)
torch.save((outputs.logits, outputs.experts_per_token, text), output)
model.save_pretrained(saved)
"""


@pytest.mark.slow
def test_a_saved_folder_works_without_the_package(tmp_path):
    model, ids = with_theta(tiny_model(**DTOP_P), 1.5, 0.7, 1.25), tokens(2, 9)
    folder = tmp_path / "with the package"
    model.save_pretrained(folder)
    for name in SHIPPED:
        code = (folder / Path(name).name).read_text()
        assert not re.search(r"^\s*(from|import) megatron", code, flags=re.M)
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [folder, tmp_path / "ids.pt", tmp_path / "output.pt", tmp_path / "saved"]
    subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, *map(str, arguments)],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    logits, experts_per_token, text = torch.load(tmp_path / "output.pt")
    expected = model(ids)
    torch.testing.assert_close(logits, expected.logits, **ROUNDING)
    assert torch.equal(experts_per_token, expected.experts_per_token)
    assert torch.equal(text, model.generate(ids, max_new_tokens=5, do_sample=False))
    # saved from there it is complete again, and with the package its code is not needed
    assert {Path(name).name for name in SHIPPED} <= {p.name for p in (tmp_path / "saved").iterdir()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is DynMoEForCausalLM
    assert_same_weights(again, model)
    torch.testing.assert_close(again(ids).logits, expected.logits, **ROUNDING)
