"""The shapes and places of a model's parameters, and how entries are put together from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dynmoe.conversion.model_settings import extra_logits
from megatron_dynmoe.conversion.names import LAYER, MODEL, PARAMETERS, Row


class Block(NamedTuple):
    """The tensor of one row in one layer and for one expert, if the row has layers and experts."""

    row: Row
    layer: int | None = None
    expert: int | None = None

    @property
    def key(self) -> str:
        """The key with its layer and expert filled in."""
        return self.row.key.format(layer=self.layer, expert=self.expert)


class Shapes:
    """The sizes of a model's parameters, and the layers that have them, from its settings.

    Args:
        config: settings under the names of :class:`DynMoEModelConfig`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        head = config["head_dim"]
        self.num_groups = groups
        self.num_layers = config["num_hidden_layers"]
        self.num_experts = config["num_experts"]
        self.layer_types = config["mlp_layer_types"]
        self.sizes = {
            "vocab": config["vocab_size"],
            "hidden": config["hidden_size"],
            "query": heads * head,
            "key": groups * head,
            "head": head,
            "ffn": config["intermediate_size"],
            "experts": config["num_experts"],
            "gate": config["num_experts"] + extra_logits(config),
            "expert_ffn": config["moe_intermediate_size"],
            "shared_ffn": config["shared_expert_intermediate_size"],
            "one": 1,
        }
        self.has = {
            "untied": not config["tie_word_embeddings"],
            "attention_bias": config["attention_bias"],
            "qk_norm": config["qk_norm"],
            "drn": config["normalization"] == "drn",
            "shared_expert": bool(config["shared_expert_intermediate_size"]),
            "shared_expert_gate": bool(
                config["shared_expert_intermediate_size"] and config["shared_expert_gate"]
            ),
        }

    def blocks(self, row: Row) -> Iterator[Block]:
        """Every layer and expert of this model that has a row's parameters."""
        parameter = row.parameter
        if parameter.when is not None and not self.has[parameter.when]:
            return
        if parameter.where == MODEL:
            yield Block(row)
            return
        for layer, kind in enumerate(self.layer_types):
            if parameter.where not in (LAYER, kind):
                continue
            if parameter.per_expert:
                yield from (Block(row, layer, expert) for expert in range(self.num_experts))
            else:
                yield Block(row, layer)

    def of_part(self, part: str) -> tuple[int, ...]:
        """The shape of one parameter."""
        return tuple(self.sizes[name] for name in PARAMETERS[part].shape)

    def of_row(self, row: Row) -> tuple[int, ...]:
        """The shape of one block of a row."""
        shapes = [self.of_part(part) for part in row.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def join(self, row: Row, parts: list[Tensor]) -> Tensor:
        """A block, put together from its parameters in the order of ``row.parts``."""
        if len(parts) == 1:
            return parts[0]
        if not row.interleaved:
            return torch.cat(parts)
        groups = [part.reshape(self.num_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(groups, dim=1).reshape(self.of_row(row))

    def part(self, row: Row, part: str, block: Tensor) -> Tensor:
        """A parameter, cut out of its block."""
        if len(row.parts) == 1:
            return block
        rows = [self.of_part(other)[0] for other in row.parts]
        index = row.parts.index(part)
        if row.interleaved:
            rows = [count // self.num_groups for count in rows]
            block = block.reshape(self.num_groups, -1, *block.shape[1:])
        start = sum(rows[:index])
        taken = block.narrow(1 if row.interleaved else 0, start, rows[index])
        return taken.reshape(self.of_part(part))
