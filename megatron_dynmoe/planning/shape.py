"""How many parameters a model has, and how many of them lie on one GPU."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_dynmoe.moe.rules import RULES
from megatron_dynmoe.planning.layout import Layout
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import FlagError
from megatron_dynmoe.settings.upstream_flags import layers_with_experts

# Settings of Megatron that change the model in ways that this module does not know, and the values
# with which they change nothing.
_UNKNOWN: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "attention_output_gate": (False,),
    "hybrid_layer_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "mtp_num_layers": (None, 0),
    "moe_latent_size": (None,),
    "fp8": (None,),
    "fp4": (None,),
    "use_torch_fsdp2": (False,),
    "use_megatron_fsdp": (False,),
    "optimizer_cpu_offload": (False,),
    "use_precision_aware_optimizer": (False,),
    "num_distributed_optimizer_instances": (1,),
    "expert_gtp_weight_remat_size": (1,),
    "pipeline_model_parallel_layout": (None,),
    "decoder_first_pipeline_num_layers": (None,),
    "decoder_last_pipeline_num_layers": (None,),
    "num_layers_per_virtual_pipeline_stage": (None,),
    "account_for_embedding_in_pipeline_split": (False,),
    "account_for_loss_in_pipeline_split": (False,),
}


class Parameters(NamedTuple):
    """Numbers of parameters, split by the ranks that share their optimizer state.

    Attributes:
        dense: parameters that all data-parallel ranks share.
        expert: parameters that only the data-parallel ranks of an expert share.
    """

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.dense + self.expert


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a GPT that determine its parameters and activations.

    Attributes:
        query_size, key_value_size: sizes of the projections' outputs; the latter is for keys and
            values together.
        ffn, expert_ffn, shared_ffn: FFN sizes of a dense layer, of an expert, and of the shared
            experts (0 if there are none).
        vocab: vocabulary size, padded.
        num_experts: experts of an MoE layer; 0 for a dense model.
        moe_layers: for each layer, whether it has experts.
        gate_factor: 2 with a gated activation such as SwiGLU, 1 without.
        norm_parameters: parameters of a norm per normalized value: 1 (weight) or 2 (and bias).
        positions: number of learned position embeddings, or 0.
        gate_rows: rows of a router's gate: mostly one for each expert.
        has_theta: whether each router has a learnable scale (dynamic routing normalization).
    """

    hidden: int
    num_heads: int
    query_size: int
    key_value_size: int
    ffn: int
    expert_ffn: int
    shared_ffn: int
    vocab: int
    num_experts: int
    moe_layers: tuple[bool, ...]
    gate_factor: int
    norm_parameters: int
    positions: int
    linear_bias: bool
    qkv_bias: bool
    qk_norm: bool
    shared_gate: bool
    tied_embeddings: bool
    gate_rows: int
    has_theta: bool

    @classmethod
    def from_args(cls, args: Namespace, dynmoe: DynMoEConfig) -> ModelShape:
        """Read Megatron's arguments; defaults that Megatron derives have to be filled in.

        Args:
            dynmoe: resolved settings.

        Raises:
            ValueError: the planner does not know the effect of a setting that is used.
        """
        for name, known in _UNKNOWN.items():
            value = getattr(args, name, known[0])
            if value not in known:
                raise FlagError(
                    name,
                    value,
                    "",
                    "parameters and memory are not known with it. Leave it out to plan without",
                )
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        return cls(
            hidden=args.hidden_size,
            num_heads=args.num_attention_heads,
            query_size=args.num_attention_heads * args.kv_channels,
            key_value_size=2 * groups * args.kv_channels,
            ffn=args.ffn_hidden_size,
            expert_ffn=args.moe_ffn_hidden_size or args.ffn_hidden_size,
            shared_ffn=args.moe_shared_expert_intermediate_size or 0,
            vocab=args.padded_vocab_size,
            num_experts=args.num_experts or 0,
            moe_layers=layers_with_experts(args.moe_layer_freq, args.num_layers)
            if args.num_experts
            else (False,) * args.num_layers,
            gate_factor=2 if args.swiglu else 1,
            norm_parameters=1 if args.normalization == "RMSNorm" else 2,
            positions=args.max_position_embeddings
            if args.position_embedding_type == "learned_absolute"
            else 0,
            linear_bias=args.add_bias_linear,
            qkv_bias=args.add_bias_linear or args.add_qkv_bias,
            qk_norm=args.qk_layernorm,
            shared_gate=args.moe_shared_expert_gate,
            tied_embeddings=not args.untie_embeddings_and_output_weights,
            gate_rows=(args.num_experts or 0)
            + (RULES[dynmoe.routing].extra_logits if dynmoe.is_dynamic else 0),
            has_theta=dynmoe.normalization == "drn",
        )

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with experts."""
        return sum(self.moe_layers)

    @property
    def parameters_per_expert(self) -> int:
        """Parameters of one expert of one layer."""
        return _mlp(self, self.expert_ffn, 1)


def total_parameters(shape: ModelShape) -> int:
    """Count all parameters of the model."""
    whole = Split(1, 1, 1)
    layers = sum(_layer(shape, is_moe, whole).total for is_moe in shape.moe_layers)
    output = 0 if shape.tied_embeddings else shape.vocab * shape.hidden
    return _embedding(shape, whole) + layers + _norm(shape) + output


def active_parameters(shape: ModelShape, experts_per_token: float) -> float:
    """Count the parameters that a token uses, including embeddings, as the papers count them."""
    unused = (shape.num_experts - experts_per_token) * shape.parameters_per_expert
    return total_parameters(shape) - shape.num_moe_layers * unused


def parameters_on_gpu(shape: ModelShape, layout: Layout, stage: int) -> Parameters:
    """Count the parameters on each GPU of a pipeline rank.

    Args:
        stage: the pipeline rank, from 0.
    """
    split = Split(layout.tensor, layout.expert, layout.expert_tensor)
    parts = [_layer(shape, shape.moe_layers[i], split) for i in layers_of(shape, layout, stage)]
    dense, expert = sum(part.dense for part in parts), sum(part.expert for part in parts)
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    if is_first:
        dense += _embedding(shape, split)
    if is_last:
        dense += _norm(shape)
        # The last stage holds a copy of tied weights, unless it is also the first.
        if not (shape.tied_embeddings and is_first):
            dense += shape.vocab * shape.hidden // split.tensor
    return Parameters(dense, expert)


def layers_of(shape: ModelShape, layout: Layout, stage: int) -> list[int]:
    """List the layers of a pipeline rank; with virtual stages, those of all its chunks."""
    chunks = layout.pipeline * layout.stages_per_rank
    size = len(shape.moe_layers) // chunks
    firsts = range(stage * size, len(shape.moe_layers), layout.pipeline * size)
    return [layer for first in firsts for layer in range(first, first + size)]


class Split(NamedTuple):
    """The number of parts into which weights are split."""

    tensor: int
    expert: int
    expert_tensor: int


def _layer(shape: ModelShape, is_moe: bool, split: Split) -> Parameters:
    attention = shape.hidden * (2 * shape.query_size + shape.key_value_size) // split.tensor
    if shape.qkv_bias:
        attention += (shape.query_size + shape.key_value_size) // split.tensor
    if shape.linear_bias:
        attention += shape.hidden
    if shape.qk_norm:
        attention += 2 * shape.norm_parameters * (shape.query_size // shape.num_heads)
    dense = attention + 2 * _norm(shape)
    if not is_moe:
        return Parameters(dense + _mlp(shape, shape.ffn, split.tensor), 0)
    dense += shape.gate_rows * (shape.hidden + shape.linear_bias) + shape.has_theta
    if shape.shared_ffn:
        dense += _mlp(shape, shape.shared_ffn, split.tensor) + shape.shared_gate * shape.hidden
    local_experts = shape.num_experts // split.expert
    return Parameters(dense, local_experts * _mlp(shape, shape.expert_ffn, split.expert_tensor))


def _mlp(shape: ModelShape, ffn: int, split: int) -> int:
    weights = (shape.gate_factor + 1) * shape.hidden * ffn // split
    biases = shape.gate_factor * ffn // split + shape.hidden
    return weights + (biases if shape.linear_bias else 0)


def _norm(shape: ModelShape) -> int:
    return shape.norm_parameters * shape.hidden


def _embedding(shape: ModelShape, split: Split) -> int:
    return shape.hidden * (shape.vocab // split.tensor + shape.positions)
