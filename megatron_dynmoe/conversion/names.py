"""Which tensor is called what where: one table of names per format, read in both directions.

A model consists of *parameters* (:data:`PARAMETERS`), the smallest tensors that any format keeps
apart. A *format* is a list of rows; each row says which parameters one of its entries holds, one
below the other. A parameter that exists once per layer or expert is written with ``{layer}`` or
``{expert}`` in the key; where ``{expert}`` is missing from the key of an expert's row, the experts
are stacked along a leading dimension. Megatron stacks the layers, too, where all are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MODEL, LAYER, SPARSE, DENSE = "model", "layer", "sparse", "dense"


@dataclass(frozen=True)
class Parameter:
    """Shape, by names of dimensions, and the place of one parameter."""

    shape: tuple[str, ...]
    where: str = LAYER  # once a model, in every layer, in those with experts or those without
    when: str | None = None  # the setting on which it depends
    per_expert: bool = False


PARAMETERS: dict[str, Parameter] = {
    "embedding": Parameter(("vocab", "hidden"), MODEL),
    "final_norm": Parameter(("hidden",), MODEL),
    "lm_head": Parameter(("vocab", "hidden"), MODEL, when="untied"),
    "attention_norm": Parameter(("hidden",)),
    "q": Parameter(("query", "hidden")),
    "k": Parameter(("key", "hidden")),
    "v": Parameter(("key", "hidden")),
    "q_bias": Parameter(("query",), when="attention_bias"),
    "k_bias": Parameter(("key",), when="attention_bias"),
    "v_bias": Parameter(("key",), when="attention_bias"),
    "q_norm": Parameter(("head",), when="qk_norm"),
    "k_norm": Parameter(("head",), when="qk_norm"),
    "o": Parameter(("hidden", "query")),
    "mlp_norm": Parameter(("hidden",)),
    "gate": Parameter(("ffn", "hidden"), DENSE),
    "up": Parameter(("ffn", "hidden"), DENSE),
    "down": Parameter(("hidden", "ffn"), DENSE),
    "router": Parameter(("experts", "hidden"), SPARSE),
    "theta_offset": Parameter(("one",), SPARSE, when="drn"),
    "expert_gate": Parameter(("expert_ffn", "hidden"), SPARSE, per_expert=True),
    "expert_up": Parameter(("expert_ffn", "hidden"), SPARSE, per_expert=True),
    "expert_down": Parameter(("hidden", "expert_ffn"), SPARSE, per_expert=True),
    "shared_gate": Parameter(("shared_ffn", "hidden"), SPARSE, when="shared_expert"),
    "shared_up": Parameter(("shared_ffn", "hidden"), SPARSE, when="shared_expert"),
    "shared_down": Parameter(("hidden", "shared_ffn"), SPARSE, when="shared_expert"),
    "shared_expert_gate": Parameter(("one", "hidden"), SPARSE, when="shared_expert_gate"),
}


@dataclass(frozen=True)
class Row:
    """One entry of a format.

    ``parts`` lie one below the other, except that ``interleaved`` ones alternate by query group,
    as Megatron keeps q, k and v. ``aliases`` are other keys for the same tensor: written, too, and
    read where the key itself is missing.
    """

    key: str
    parts: tuple[str, ...]
    interleaved: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def parameter(self) -> Parameter:
        """The first of its parameters; all of them live in the same place."""
        return PARAMETERS[self.parts[0]]

    @property
    def stacked(self) -> bool:
        """Whether the experts lie along a leading dimension."""
        return self.parameter.per_expert and "{expert}" not in self.key


def _row(key: str, *parts: str, **kwargs: Any) -> Row:
    return Row(key, parts, **kwargs)


_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."
_HUGGING_FACE = (
    _row("model.embed_tokens.weight", "embedding"),
    _row("model.norm.weight", "final_norm"),
    _row("lm_head.weight", "lm_head"),
    _row(_ATTENTION + "q_proj.weight", "q"),
    _row(_ATTENTION + "k_proj.weight", "k"),
    _row(_ATTENTION + "v_proj.weight", "v"),
    _row(_ATTENTION + "o_proj.weight", "o"),
)
_USUAL_NORMS = (
    _row("model.layers.{layer}.input_layernorm.weight", "attention_norm"),
    _row("model.layers.{layer}.post_attention_layernorm.weight", "mlp_norm"),
)

DYNMOE = (
    *_HUGGING_FACE,
    *_USUAL_NORMS,
    _row(_ATTENTION + "q_proj.bias", "q_bias"),
    _row(_ATTENTION + "k_proj.bias", "k_bias"),
    _row(_ATTENTION + "v_proj.bias", "v_bias"),
    _row(_ATTENTION + "q_norm.weight", "q_norm"),
    _row(_ATTENTION + "k_norm.weight", "k_norm"),
    _row(_MLP + "gate_proj.weight", "gate"),
    _row(_MLP + "up_proj.weight", "up"),
    _row(_MLP + "down_proj.weight", "down"),
    _row(_MLP + "router.weight", "router"),
    _row(_MLP + "router.theta_offset", "theta_offset"),
    _row(_MLP + "experts.gate_up_proj", "expert_gate", "expert_up"),
    _row(_MLP + "experts.down_proj", "expert_down"),
    _row(_MLP + "shared_expert.gate_proj.weight", "shared_gate"),
    _row(_MLP + "shared_expert.up_proj.weight", "shared_up"),
    _row(_MLP + "shared_expert.down_proj.weight", "shared_down"),
    _row(_MLP + "shared_expert_gate.weight", "shared_expert_gate"),
)

DYNAMIC_MOE = (
    *_HUGGING_FACE,
    _row("model.layers.{layer}.input_norm.weight", "attention_norm"),
    _row("model.layers.{layer}.post_attention_norm.weight", "mlp_norm"),
    _row(_MLP + "mlp.gate_proj.weight", "gate"),
    _row(_MLP + "mlp.up_proj.weight", "up"),
    _row(_MLP + "mlp.down_proj.weight", "down"),
    _row(_MLP + "router.weight", "router"),
    _row(_MLP + "experts.{expert}.gate_proj.weight", "expert_gate"),
    _row(_MLP + "experts.{expert}.up_proj.weight", "expert_up"),
    _row(_MLP + "experts.{expert}.down_proj.weight", "expert_down"),
)

_SPARSE_BLOCK = "model.layers.{layer}.block_sparse_moe."
MIXTRAL = (
    *_HUGGING_FACE,
    *_USUAL_NORMS,
    _row(_SPARSE_BLOCK + "gate.weight", "router"),
    _row(_SPARSE_BLOCK + "experts.{expert}.w1.weight", "expert_gate"),
    _row(_SPARSE_BLOCK + "experts.{expert}.w2.weight", "expert_down"),
    _row(_SPARSE_BLOCK + "experts.{expert}.w3.weight", "expert_up"),
)

_BLOCK = "decoder.layers.{layer}."
MEGATRON: tuple[Row, ...] = (
    _row("embedding.word_embeddings.weight", "embedding"),
    _row("decoder.final_layernorm.weight", "final_norm"),
    _row("output_layer.weight", "lm_head"),
    _row(
        _BLOCK + "self_attention.linear_qkv.layer_norm_weight",
        "attention_norm",
        aliases=(_BLOCK + "input_layernorm.weight",),
    ),
    _row(_BLOCK + "self_attention.linear_qkv.weight", "q", "k", "v", interleaved=True),
    _row(_BLOCK + "self_attention.linear_qkv.bias", "q_bias", "k_bias", "v_bias", interleaved=True),
    _row(_BLOCK + "self_attention.q_layernorm.weight", "q_norm"),
    _row(_BLOCK + "self_attention.k_layernorm.weight", "k_norm"),
    _row(_BLOCK + "self_attention.linear_proj.weight", "o"),
    # The local back end looks for the first name, Transformer Engine, with experts, for the second.
    _row(
        _BLOCK + "mlp.linear_fc1.layer_norm_weight",
        "mlp_norm",
        aliases=(_BLOCK + "pre_mlp_layernorm.weight",),
    ),
    _row(_BLOCK + "mlp.linear_fc1.weight", "gate", "up"),
    _row(_BLOCK + "mlp.linear_fc2.weight", "down"),
    _row(_BLOCK + "mlp.router.weight", "router"),
    _row(_BLOCK + "mlp.router.theta_offset", "theta_offset"),
    _row(_BLOCK + "mlp.experts.experts.linear_fc1.weight", "expert_gate", "expert_up"),
    _row(_BLOCK + "mlp.experts.experts.linear_fc2.weight", "expert_down"),
    _row(_BLOCK + "mlp.shared_experts.linear_fc1.weight", "shared_gate", "shared_up"),
    _row(_BLOCK + "mlp.shared_experts.linear_fc2.weight", "shared_down"),
    _row(_BLOCK + "mlp.shared_experts.gate_weight", "shared_expert_gate"),
)
# What a router keeps besides its parameters, [1] float32 a layer; elsewhere it is in the config.
ROUTER_STATE = {
    name: _BLOCK + f"mlp.router.{name}" for name in ("threshold", "integral", "measured")
}

FORMATS: dict[str, tuple[Row, ...]] = {
    "dynmoe": DYNMOE,
    "dynamic-moe": DYNAMIC_MOE,
    "mixtral": MIXTRAL,
}


class Block(NamedTuple):
    """The tensor of one row in one layer and for one expert, where it has them."""

    row: Row
    layer: int | None = None
    expert: int | None = None

    @property
    def key(self) -> str:
        """The key with its layer and expert filled in."""
        return self.row.key.format(layer=self.layer, expert=self.expert)


class Shapes:
    """The sizes of a model's parameters, and where they exist, from its settings.

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
        """Every place at which a row's parameters exist in this model."""
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
        """One block from its parameters, in the order of ``row.parts``."""
        if len(parts) == 1:
            return parts[0]
        if not row.interleaved:
            return torch.cat(parts)
        groups = [part.reshape(self.num_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(groups, dim=1).reshape(self.of_row(row))

    def part(self, row: Row, part: str, block: Tensor) -> Tensor:
        """One parameter out of its block."""
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


def rows_by_part(table: tuple[Row, ...]) -> dict[str, Row]:
    """The row of each parameter that a format knows."""
    return {part: row for row in table for part in row.parts}
