"""A small model with random weights and a real tokenizer, in a folder as an export makes it."""

import os
from pathlib import Path
from typing import Any

import torch

BOOK = Path("examples/data/book.jsonl.gz")
VOCAB_SIZE = 600


def make_tokenizer(folder: Path) -> Path:
    """A SentencePiece model with byte pieces, trained on a part of a real book."""
    from megatron_dynmoe.data.train_tokenizer import train_tokenizer

    return train_tokenizer([str(BOOK)], str(folder / "book"), VOCAB_SIZE)


def export_tiny(folder: Path, tokenizer_model: Path, *, seed: int = 0, **settings: Any) -> Any:
    """Write a model of 3 layers, the second of them dense, and return it."""
    from megatron_dynmoe.conversion.hugging_face.tokenizer import export_tokenizer
    from megatron_dynmoe.huggingface import DynMoEForCausalLM, DynMoEModelConfig

    config = {
        "vocab_size": VOCAB_SIZE + 8,  # padded, as training does
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "intermediate_size": 32,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        # Large, so that routers, and with them counts, differ between tokens.
        "initializer_range": 0.6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | settings
    torch.manual_seed(seed)
    model = DynMoEForCausalLM(DynMoEModelConfig(**config)).eval()
    model.save_pretrained(folder)
    export_tokenizer(tokenizer_model, folder)
    return model


def command_environment() -> dict[str, str]:
    """For commands that tests start: no network, one thread."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
