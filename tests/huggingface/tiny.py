"""A model small enough to build in every test, with weights large enough to route unevenly."""

from typing import Any

import torch

from megatron_dynmoe.huggingface import DynMoEForCausalLM, DynMoEModelConfig

VOCABULARY = 97
LAYERS = 3


def tiny_config(**overrides: Any) -> DynMoEModelConfig:
    """Three layers with 8 experts, grouped queries, ids from 3 on ordinary tokens."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    return DynMoEModelConfig(**(shape | overrides))


def tiny_model(seed: int = 0, attention: str = "sdpa", **overrides: Any) -> DynMoEForCausalLM:
    """A model in evaluation mode, every norm's weight off 1 and every bias off 0."""
    torch.manual_seed(seed)
    config = tiny_config(**overrides)
    config._attn_implementation = attention
    model = DynMoEForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Ids of ordinary tokens, [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as a batch padded on the left, and its attention mask."""
    length = max(len(row) for row in rows)
    padding = [row.new_zeros(length - len(row)) for row in rows]
    ids = [torch.cat((pad, row)) for pad, row in zip(padding, rows, strict=True)]
    mask = [torch.cat((pad, torch.ones_like(row))) for pad, row in zip(padding, rows, strict=True)]
    return torch.stack(ids), torch.stack(mask)
