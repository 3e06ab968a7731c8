"""Folders that Transformers' own models save: read, computed as they compute, and given back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from megatron_dynmoe.conversion.convert import Target, from_hf, to_hf
from megatron_dynmoe.conversion.formats import FORMATS, format_of
from megatron_dynmoe.conversion.megatron.settings import training_flags
from megatron_dynmoe.layers import moe
from tests.conversion.foreign import MODELS, loaded, logits, save_random


@pytest.mark.parametrize("name", MODELS)
def test_ours_has_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """To the bit, with eager experts and in float32.

    But if a token's weights are divided by their sum, theirs adds them up in the order of
    probability, and ours, as in training, in that of the experts. Nothing else differs. (Of larger
    models a bit may differ, too: theirs hands an expert its rows in another order, and a matrix
    product may round a row by its place.)
    """
    theirs = save_random(name, tmp_path / "theirs")
    expected = logits(theirs)
    assert expected.std() > 1
    to_hf(tmp_path / "theirs", Target(tmp_path / "ours"))
    ours = loaded(tmp_path / "ours")
    if getattr(theirs.config, "norm_topk_prob", False):
        torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=0)

        def weigh(probs_TE: torch.Tensor, map_TE: torch.Tensor, renormalize: bool) -> torch.Tensor:
            assert renormalize
            chosen_TE, most = probs_TE * map_TE, int(map_TE[0].sum())
            return chosen_TE / chosen_TE.topk(most).values.sum(-1, keepdim=True)

        monkeypatch.setattr(moe, "weigh", weigh)
    assert torch.equal(logits(ours), expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("qwen3-moe")])
def test_one_rename_makes_it_ours(tmp_path: Path, name: str) -> None:
    theirs = save_random(name, tmp_path / "theirs").state_dict()
    to_hf(tmp_path / "theirs", Target(tmp_path / "ours"))
    ours = loaded(tmp_path / "ours").state_dict()
    renamed = {key.replace(".mlp.gate.", ".mlp.router."): theirs[key] for key in theirs}
    assert renamed.keys() == ours.keys()
    assert all(torch.equal(renamed[key], ours[key]) for key in ours)


@pytest.mark.parametrize("name", MODELS)
def test_through_megatron_it_comes_back_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    format, model = MODELS[name][0], save_random(name, tmp_path / "theirs")
    from_hf(tmp_path / "theirs", tmp_path / "megatron", progress=False)
    to_hf(tmp_path / "megatron", Target(tmp_path / "back", format=format))
    assert "left out" not in (told := capsys.readouterr().err) and "no place" not in told
    back, info = loaded(tmp_path / "back", output_loading_info=True)
    assert type(back) is type(model) and not any(info.values())
    states = model.state_dict(), back.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert torch.equal(logits(back), logits(model))
    configs = [m.config.to_dict() for m in (model, back)]
    differing = {key for key in configs[0] if configs[0][key] != configs[1].get(key)}
    assert differing <= {"_name_or_path", "mlp_only_layers", "decoder_sparse_step"}


@pytest.mark.parametrize("name", ["qwen3, tied", "llama"])
def test_tensors_that_repeat_others_are_not_needed(tmp_path: Path, name: str) -> None:
    """The published Qwen3-0.6B repeats its tied embedding; old folders have rotary frequencies."""
    expected = logits(save_random(name, tmp_path / "theirs"))

    def add(factor: float) -> None:
        weights = tmp_path / "theirs" / "model.safetensors"
        tensors = load_file(weights)
        if name == "llama":
            frequencies = 1e4 ** (torch.arange(0, -6, -2) / 6) * factor
            for layer in range(3):
                key = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
                tensors[key] = frequencies.bfloat16()
        else:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
        save_file(tensors, weights, metadata={"format": "pt"})

    add(1)
    to_hf(tmp_path / "theirs", Target(tmp_path / "ours"))
    assert torch.equal(logits(loaded(tmp_path / "ours")), expected)
    add(0.5)
    with pytest.raises(ValueError, match="rope_theta is 10000" if name == "llama" else "are one"):
        to_hf(tmp_path / "theirs", Target(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_qwen3_moe_as_published() -> None:
    """The words of the file of Qwen3-30B-A3B."""
    theirs = {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    }  # fmt: skip
    format = FORMATS["qwen3-moe"]
    config = format.from_format(theirs)
    assert format.unread_words(theirs, config) == {}
    written = json.loads(json.dumps(format.to_format(config, "bfloat16")))
    lost = {"rope_scaling", "max_window_layers", "transformers_version"}
    assert {name for name in theirs if written.get(name) != theirs[name]} <= lost
    flags = training_flags(config, "bfloat16")
    for flag in (
        *("--qk-layernorm", "--kv-channels 128", "--group-query-attention --num-query-groups 4"),
        *("--num-experts 128", "--moe-ffn-hidden-size 768", "--moe-router-topk 8", "--bf16"),
        *("--rotary-base 1000000", "--untie-embeddings-and-output-weights"),
    ):
        assert flag in flags
    assert "--moe-router-pre-softmax" not in flags  # the weights of the chosen sum to 1
    raw = format.from_format(theirs | {"norm_topk_prob": False})
    assert "--moe-router-pre-softmax" in training_flags(raw, "bfloat16")


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Qwen3MoeConfig])
def test_what_a_file_leaves_out(config: Any) -> None:
    """Has the default of Transformers."""
    said = {
        "model_type": config.model_type, "vocab_size": 61, "hidden_size": 512,
        "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "moe_intermediate_size": 12,
        "num_experts": 16,
    }  # fmt: skip
    whole = json.loads(config.from_dict(said).to_json_string(use_diff=False))
    if "num_local_experts" in whole:
        whole["num_experts"] = whole.pop("num_local_experts")
    format = format_of(said)
    assert format.from_format(said) == format.from_format(whole)
