"""Random models of Transformers' own classes, saved as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

import megatron_dynmoe.huggingface  # noqa: F401

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that the routing matters
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
}
EAGER = {"experts_implementation": "eager"}  # the loop over experts, in all of them
# name: format, and what Transformers makes a model of
MODELS = {
    "qwen3-moe": ("qwen3-moe", Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True)),
    "qwen3-moe, raw weights, tied, every second layer dense": (
        "qwen3-moe",
        Qwen3MoeConfig(**SIZES, **EXPERTS, decoder_sparse_step=2, tie_word_embeddings=True),
    ),
    "qwen3-moe, a dense layer and another rotary base": (
        "qwen3-moe",
        Qwen3MoeConfig(
            **SIZES,
            **EXPERTS,
            mlp_only_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
    ),
    "llama": ("llama", LlamaConfig(**SIZES)),
    "qwen3, tied": ("qwen3", Qwen3Config(**SIZES, tie_word_embeddings=True)),
}


def save_random(name: str, folder: Path) -> PreTrainedModel:
    """One of :data:`MODELS` with random weights, which is then in the folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name][1], **EAGER).eval()
    for key, parameter in model.named_parameters():
        if "norm" in key:  # they begin at 1, where one cannot be told from another
            torch.nn.init.normal_(parameter, mean=1, std=0.2)
    model.save_pretrained(folder)
    return model


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **EAGER, **options)


def logits(model: Any) -> Tensor:
    """Of 2 sequences of 20 random tokens, [2, 20, 61]."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(61, (2, 20), generator=generator)).logits
