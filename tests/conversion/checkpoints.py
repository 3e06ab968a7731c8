"""Small random models, written as Megatron's checkpoints without Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.conversion.convert import Target, from_hf, to_hf
from megatron_dynmoe.conversion.formats import FORMATS
from megatron_dynmoe.conversion.formats.format import Format
from megatron_dynmoe.conversion.megatron import settings as megatron_settings
from megatron_dynmoe.conversion.megatron.writer import MegatronWriter
from megatron_dynmoe.conversion.model_settings import NO_ROUTING
from megatron_dynmoe.conversion.names import MEGATRON, Row, router_entry
from megatron_dynmoe.conversion.routing_settings import router_state
from megatron_dynmoe.conversion.shapes import Block, Shapes

TOP_P = {
    "routing": "top_p",
    "threshold": 0.3,
    "weights": "raw",
    "balance_loss": "seq_aux_loss",
    "balance_loss_coeff": 0.01,
    "dynamic_loss_coeff": 1e-4,
}
DTOP_P = TOP_P | {
    "routing": "dtop_p",
    "normalization": "drn",
    "weights": "renormalized",
    "target_experts_per_token": 2.0,
    "controller": {
        "scope": "global",
        "proportional_gain": 0.1,
        "integral_gain": 0.01,
        "initial_threshold": 0.5,
        "min_threshold": 0.0,
        "max_threshold": 1.0,
    },
}
TOP_K = {"routing": "top_k", "num_experts_per_tok": 2}
NO_EXPERTS = {"routing": "top_k", "num_experts": 0, "num_experts_per_tok": None}


def model_config(**settings: Any) -> dict[str, Any]:
    """A model of two layers with four experts each, stock top-k if nothing else is said."""
    config = NO_ROUTING | {
        "vocab_size": 13,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "hidden_act": "silu",
        "intermediate_size": 6,
        "moe_intermediate_size": 6,
        "shared_expert_intermediate_size": None,
        "shared_expert_gate": False,
        "max_position_embeddings": 16,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "qk_norm": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "num_experts": 4,
        "router_dtype": "float32",
        **TOP_K,
        **settings,
    }
    if config["routing"] != "top_k":
        config["num_experts_per_tok"] = settings.get("num_experts_per_tok")
    kind = "sparse" if config["num_experts"] else "dense"
    config.setdefault("mlp_layer_types", [kind] * config["num_hidden_layers"])
    return config


def can_hold(format: Format, config: dict[str, Any]) -> bool:
    """Whether a format can express a config without loss."""
    try:
        return not format.lost_words(config, "float32")
    except ValueError:
        return False


def example_of(format: Format) -> dict[str, Any]:
    """Settings that a format can hold, with everything else at model_config's values."""
    known = model_config().keys() - {"routing"}
    fixed = {needed.name: needed.value for needed in format.needed if needed.name in known}
    for routing in (DTOP_P, TOP_P, TOP_K, NO_EXPERTS):
        if can_hold(format, model_config(**routing | fixed)):
            return routing | fixed
    raise AssertionError(f"format {format.name} holds no model that the tests know")


EXAMPLES = {name: example_of(format) for name, format in FORMATS.items()}


def write_megatron(
    save: Path,
    config: dict[str, Any],
    dtype: str = "float32",
    seed: int = 0,
    make: Any = torch.randn,
    threshold: float = 0.3,
    has_pattern: bool = False,
    **args: Any,
) -> Path:
    """A checkpoint with random weights; ``args`` are further arguments of the run."""
    generator = torch.Generator().manual_seed(seed)
    shapes = Shapes(config)
    alike = len(set(config["mlp_layer_types"])) == 1
    writer = MegatronWriter(shapes.num_layers, shapes.num_experts, alike, has_pattern)
    for row in MEGATRON:
        for block in shapes.blocks(row):
            tensor = make(shapes.of_row(row), generator=generator)
            writer.add(block, tensor.shape, getattr(torch, dtype), lambda tensor=tensor: tensor)
    if config["routing"] != "top_k":
        for name, layers in router_state(config | {"threshold": threshold}).items():
            for layer, values in enumerate(layers):
                if values is not None:
                    block = Block(Row(router_entry(name), ("theta_offset",)), layer)
                    numbers = torch.tensor(values, dtype=torch.float32).view(-1)
                    writer.add(block, numbers.shape, torch.float32, lambda numbers=numbers: numbers)
    writer.write(save, megatron_settings.args_from_config(config, dtype, has_pattern) | args)
    return save


def export(
    folder: Path, format: str = "dynmoe", dtype: str = "float32", **settings: Any
) -> tuple[Path, Path]:
    """A checkpoint and its Hugging Face folder, in several shards."""
    config = model_config(**(EXAMPLES[format] | settings))
    load = write_megatron(folder / "megatron", config, dtype)
    to_hf(load, Target(folder / "hf", format=format, max_shard_size=3000))
    return load, folder / "hf"


def import_again(model: Path, save: Path) -> Path:
    """A checkpoint made of a Hugging Face folder."""
    from_hf(model, save, progress=False)
    return save


def megatron_tensors(save: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as torch's own reader sees them."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(save / "release")
    entries = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state
