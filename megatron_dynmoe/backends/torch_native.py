"""The back end that needs nothing but PyTorch: attention, norms and experts in its fused calls.

Upstream's ``local`` back end, which runs without Transformer Engine too, writes the attention
matrix out, runs one expert after another, and its norms refuse sequence parallelism and so tensor
parallelism. Here

- attention is ``scaled_dot_product_attention``,
- norms are PyTorch's, with the mark that sequence parallelism needs,
- experts are grouped GEMMs (:mod:`megatron_dynmoe.moe.experts`);

linear layers, embeddings and everything else stay those of ``local``. Parameters of checkpoints
have the same names. Where it runs is decided in :mod:`megatron_dynmoe.backends.choice`.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.torch_norm import L2Norm
from torch import Tensor

from megatron_dynmoe.moe.experts import GroupedExperts

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dynmoe.backends.choice import Plan

# Added to a score that is masked; upstream writes the same in its place.
MASKED_SCORE = -10000.0


class ScaledDotProductAttention(DotProductAttention):
    """Upstream's local core attention through PyTorch's fused one.

    Same arguments, masks and dropout (the probabilities of a head, in the generator of upstream's
    tracker). Grouped queries are not expanded.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, N, H].
            key: [Sk, B, G, H], G the number of query groups.
            value: as the key.
            attention_mask: True where a score is masked, broadcast to [B, N, S, Sk]. None: causal,
                or none at all where the layer is not causal or S is 1.

        Returns:
            [S, B, N * H].

        Raises:
            ValueError: packed sequences or a bias, which need Transformer Engine, as upstream.
        """
        if packed_seq_params is not None or attention_bias is not None:
            what = "a bias" if packed_seq_params is None else "packed sequences"
            raise ValueError(f"The attention of torch_native does not take {what}.")
        is_causal = self.attn_mask_type == AttnMaskType.causal and query.shape[0] > 1
        mask = None
        if attention_mask is not None:
            # Not minus infinity: a row that is masked whole, of padding, stays finite. It attends
            # to all by its scores; upstream's does so evenly.
            mask = torch.zeros_like(attention_mask, dtype=query.dtype)
            mask.masked_fill_(attention_mask, MASKED_SCORE)
        dropout = self.attention_dropout.p if self.training else 0.0
        attend = partial(
            torch.nn.functional.scaled_dot_product_attention,
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal and mask is None,
            scale=self._scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        if dropout and not self.config.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context_BNSH = attend()
        else:
            context_BNSH = attend()
        return context_BNSH.permute(2, 0, 1, 3).flatten(2)

    @property
    def _scale(self) -> float:
        """Upstream divides by the layer's number before the softmax and multiplies within it."""
        divided = self.config.apply_query_key_layer_scaling
        return self.softmax_scale * (self.layer_number if divided else 1)


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm; on the CPU, where PyTorch strings ten calls together, in fewer."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize the last dimension, in float32, and scale it."""
        if hidden.device.type == "cuda":
            return super().forward(hidden)
        return _RMSNormOnCPU.apply(hidden, self.weight, self.eps)


class _RMSNormOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        wide_weight = weight.float()
        normed = hidden * scale  # float32, as scale is
        by_normed = grad * normed
        mean = (by_normed @ wide_weight).div_(hidden.shape[-1]).unsqueeze(-1)
        grad_hidden = (grad * wide_weight).addcmul_(normed, mean, value=-1).mul_(scale)
        grad_weight = by_normed.flatten(0, -2).sum(0)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None


def native_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
) -> torch.nn.Module:
    """PyTorch's RMSNorm or LayerNorm, whose gradients are summed over sequence-parallel ranks."""
    cls = {"RMSNorm": RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
    norm = cls(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


class TorchNativeSpecProvider(LocalSpecProvider):
    """Upstream's local modules, but for attention, norms and experts."""

    def __init__(self, plan: Plan) -> None:
        self.kept = plan.kept

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        """Which module to use for norms."""
        return native_norm

    def core_attention(self) -> type:
        """Which module to use for attention."""
        return super().core_attention() if "attention" in self.kept else ScaledDotProductAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Which module to use for experts."""
        if "experts" in self.kept:
            return super().grouped_mlp_modules(moe_use_grouped_gemm)
        return GroupedExperts


def with_native_modules(
    spec: TransformerBlockSubmodules, plan: Plan, config: TransformerConfig
) -> TransformerBlockSubmodules:
    """A copy of upstream's local spec with this back end's modules.

    Upstream's functions that build it name their provider themselves, so there is none to hand in.
    """
    provider = TorchNativeSpecProvider(plan)
    layers: dict[int, Any] = {}  # upstream shares one spec object among all layers
    for layer in spec.layer_specs:
        if id(layer) not in layers:
            layers[id(layer)] = _native_layer(layer, provider, config)
    return dataclasses.replace(
        spec,
        layer_specs=[layers[id(layer)] for layer in spec.layer_specs],
        layer_norm=_norm_or(provider, spec.layer_norm),
    )


def _native_layer(layer: Any, provider: TorchNativeSpecProvider, config: TransformerConfig) -> Any:
    submodules = layer.submodules
    attention = copy.copy(submodules.self_attention)
    parts = {
        name: _norm_or(provider, getattr(attention.submodules, name))
        for name in ("q_layernorm", "k_layernorm")
        if hasattr(attention.submodules, name)
    }
    attention.submodules = dataclasses.replace(
        attention.submodules, core_attention=provider.core_attention(), **parts
    )

    mlp = submodules.mlp
    if isinstance(mlp, partial) and mlp.func is MoELayer:
        experts = provider.grouped_mlp_modules(config.moe_grouped_gemm)
        moe = dataclasses.replace(mlp.keywords["submodules"], experts=experts)
        mlp = partial(MoELayer, **(mlp.keywords | {"submodules": moe}))
    layer = copy.copy(layer)
    layer.submodules = dataclasses.replace(
        submodules,
        self_attention=attention,
        mlp=mlp,
        input_layernorm=_norm_or(provider, submodules.input_layernorm),
        pre_mlp_layernorm=_norm_or(provider, submodules.pre_mlp_layernorm),
    )
    return layer


def _norm_or(provider: TorchNativeSpecProvider, norm: Any) -> Any:
    """This back end's norm where upstream's spec has one that ``normalization`` names."""
    return norm if norm in (None, IdentityOp, L2Norm) else provider.layer_norm(rms_norm=True)
