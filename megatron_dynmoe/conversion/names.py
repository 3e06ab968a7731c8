"""The parameters of a model, their names in Megatron's checkpoints, and rows of names.

A model consists of *parameters* (:data:`PARAMETERS`), the smallest tensors that any format keeps
apart. The names of a format are a table of rows, read in both directions: Megatron's is here, the
others are in ``formats/``. A row says which parameters one entry holds, one below the other. A
parameter that exists once per layer or expert is written with ``{layer}`` or ``{expert}`` in the
key. If ``{expert}`` is missing from the key of an expert's row, the experts are stacked along a
leading dimension. Megatron stacks the layers, too, if all are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_dynmoe.settings.distribution import KNOTS

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
    "router": Parameter(("gate", "hidden"), SPARSE),
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
    as Megatron keeps q, k and v. ``aliases`` are other keys for the same tensor: they are written,
    too, and read if the key itself is missing.
    """

    key: str
    parts: tuple[str, ...]
    interleaved: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys under which the tensor may be."""
        return (self.key, *self.aliases)

    @property
    def parameter(self) -> Parameter:
        """The first of its parameters; all of them exist in the same layers."""
        return PARAMETERS[self.parts[0]]

    @property
    def stacked(self) -> bool:
        """Whether the experts lie along a leading dimension."""
        return self.parameter.per_expert and "{expert}" not in self.key


def row(key: str, *parts: str, **kwargs: Any) -> Row:
    """A row of a table; further arguments are those of :class:`Row`."""
    return Row(key, parts, **kwargs)


_BLOCK = "decoder.layers.{layer}."
_FINAL_NORM = ("decoder.final_layernorm.", "decoder.final_norm.")  # and a HybridModel's name for it
MEGATRON: tuple[Row, ...] = (
    row("embedding.word_embeddings.weight", "embedding"),
    row("decoder.final_layernorm.weight", "final_norm"),
    row("output_layer.weight", "lm_head"),
    row(
        _BLOCK + "self_attention.linear_qkv.layer_norm_weight",
        "attention_norm",
        aliases=(_BLOCK + "input_layernorm.weight",),
    ),
    row(_BLOCK + "self_attention.linear_qkv.weight", "q", "k", "v", interleaved=True),
    row(_BLOCK + "self_attention.linear_qkv.bias", "q_bias", "k_bias", "v_bias", interleaved=True),
    row(_BLOCK + "self_attention.q_layernorm.weight", "q_norm"),
    row(_BLOCK + "self_attention.k_layernorm.weight", "k_norm"),
    row(_BLOCK + "self_attention.linear_proj.weight", "o"),
    # The local back end looks for the first name, Transformer Engine, with experts, for the second.
    row(
        _BLOCK + "mlp.linear_fc1.layer_norm_weight",
        "mlp_norm",
        aliases=(_BLOCK + "pre_mlp_layernorm.weight",),
    ),
    row(_BLOCK + "mlp.linear_fc1.weight", "gate", "up"),
    row(_BLOCK + "mlp.linear_fc2.weight", "down"),
    row(_BLOCK + "mlp.router.weight", "router"),
    row(_BLOCK + "mlp.router.theta_offset", "theta_offset"),
    row(_BLOCK + "mlp.experts.experts.linear_fc1.weight", "expert_gate", "expert_up"),
    row(_BLOCK + "mlp.experts.experts.linear_fc2.weight", "expert_down"),
    row(_BLOCK + "mlp.shared_experts.linear_fc1.weight", "shared_gate", "shared_up"),
    row(_BLOCK + "mlp.shared_experts.linear_fc2.weight", "shared_down"),
    row(_BLOCK + "mlp.shared_experts.gate_weight", "shared_expert_gate"),
)


def router_entry(name: str) -> str:
    """Megatron's name of a part of a router's state, which other formats keep in the config."""
    return _BLOCK + f"mlp.router.{name}"


def in_halves(key: str, layer: int | None) -> tuple[str, int | None]:
    """Where a ``HybridModel`` has an entry: its layers are either attention or an MLP.

    Args:
        key: of an entry of the table, or of a router's state.
        layer: counted as in the table, from 0; None outside of layers.

    Returns:
        The key, still with its ``{layer}``, and the layer as the checkpoint counts it.
    """
    half = ".mlp." in key or ".pre_mlp_layernorm." in key
    return key.replace(*_FINAL_NORM), None if layer is None else 2 * layer + half


# The map of a target that is drawn: a number for each knot.
ROUTER_MAP = {name: router_entry(name) for name in KNOTS}


def rows_by_part(table: tuple[Row, ...]) -> dict[str, Row]:
    """The row of each parameter that a format knows."""
    return {part: row for row in table for part in row.parts}
