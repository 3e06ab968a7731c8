"""The back end that needs only PyTorch: its fused calls run attention, norms and experts.

Upstream's ``local`` back end also runs without Transformer Engine. But it materializes the
attention matrix and runs one expert after another. Its norms refuse sequence parallelism, and so
rule out tensor parallelism. In this back end

- attention is ``scaled_dot_product_attention``,
- norms are PyTorch's, with the mark that sequence parallelism needs,
- experts are grouped GEMMs (:mod:`megatron_dynmoe.moe.experts`).

Linear layers, embeddings and everything else are those of ``local``. Parameters have the same names
in checkpoints. :mod:`megatron_dynmoe.backends.choice` decides when this back end is used.
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
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.torch_norm import L2Norm
from torch import Tensor

from megatron_dynmoe.backends.attention.context_parallel import gather_sequence, scatter_sequence
from megatron_dynmoe.backends.attention.documents import are_lengths, attend_by_document
from megatron_dynmoe.backends.attention.latent_attention import (
    LatentAttention,
    names_in_checkpoints,
    needs_one_size,
    padded,
)
from megatron_dynmoe.moe.experts import GroupedExperts

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.distributed import ProcessGroup

    from megatron_dynmoe.backends.choice import BackEnd

# This is added to a masked score; upstream replaces the score by the same number.
MASKED_SCORE = -10000.0


class ScaledDotProductAttention(DotProductAttention):
    """Upstream's local core attention, computed by PyTorch's fused attention.

    Arguments, masks and dropout are upstream's. Dropout applies to the attention probabilities and
    draws from the generator of upstream's tracker. Grouped queries are not expanded. Under context
    parallelism ranks exchange heads; see :mod:`~.attention.context_parallel`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Build upstream's attention, which asserts that no sequence is split.

        Latent attention also passes the sizes of its heads, which upstream's does not take. This
        one reads sizes from its inputs.
        """
        whole = copy.copy(config)
        whole.context_parallel_size = 1
        super().__init__(whole, *args, **kwargs)
        self.config = config

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
            query: [S, B, N, H]; under context parallelism S is the length of this rank's part.
            key: [Sk, B, G, H]; G is the number of query groups.
            value: [Sk, B, G, Hv]; Hv differs from H with latent attention only.
            attention_mask: True for masked scores, broadcast to [B, N, S, Sk]; or, as int64, the
                lengths of the documents, each of which is attended to by itself
                (:mod:`~.attention.documents`). None: the causal mask, or no mask if
                the layer is not causal or S is 1.

        Returns:
            [S, B, N * Hv].

        Raises:
            ValueError: there are packed sequences or a bias. Both need Transformer Engine in
                upstream, too.
        """
        if packed_seq_params is not None or attention_bias is not None:
            what = "a bias" if packed_seq_params is None else "packed sequences"
            raise ValueError(f"The attention of torch_native does not take {what}.")
        mask, lengths = attention_mask, None
        if are_lengths(attention_mask):
            mask, lengths = None, attention_mask
        value_size = value.shape[3]
        if needs_one_size(self.config, query, value):
            query, key, value = padded(query, key, value)
        if self.config.context_parallel_size > 1:
            if mask is not None:
                raise ValueError(
                    "The attention of torch_native takes no mask under context parallelism."
                )
            query, key, value = gather_sequence((query, key, value), self._context_group)
        dropout = self.attention_dropout.p if self.training else 0.0
        whole = partial(self._attend, mask=mask, dropout=dropout)
        if lengths is None:
            attend = partial(whole, *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
        else:
            attend = partial(attend_by_document, whole, query, key, value, lengths)
        if dropout and not self.config.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = attend()
        else:
            context = attend()
        if lengths is None:
            context = context.permute(2, 0, 1, 3)
        if self.config.context_parallel_size > 1:
            context = scatter_sequence(context, self._context_group)
        return context[..., :value_size].flatten(2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, dropout: float
    ) -> Tensor:
        """Attend: [B, N, S, H] of queries to [B, N, S, Hv] of values."""
        added = None
        if mask is not None:
            # With minus infinity, a fully masked row (padding) would become NaN. Such a row here
            # attends to all keys by its scores; in upstream it attends to all keys evenly.
            added = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, MASKED_SCORE)
        is_causal = self.attn_mask_type == AttnMaskType.causal and query.shape[2] > 1
        if query.device.type == "cpu" and query.shape[2] == key.shape[2]:
            # To read a head whose positions lie far apart takes longer, forward and backward, than
            # to copy it, unless few queries read it. Rotated queries and keys lie as they should.
            query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=added,
            dropout_p=dropout,
            is_causal=is_causal and mask is None,
            scale=self._scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    @property
    def _context_group(self) -> ProcessGroup:
        """The ranks that hold the other parts of this rank's sequences."""
        return self.pg_collection.cp

    @property
    def _scale(self) -> float:
        """Undo upstream's division of the scale by the layer number, as its own softmax does."""
        divided = self.config.apply_query_key_layer_scaling
        return self.softmax_scale * (self.layer_number if divided else 1)


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm. On the CPU, PyTorch makes ten calls for it; this class makes fewer."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize the last dimension in float32, and scale it."""
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
        normed = hidden * scale  # scale is float32, so the product is, too
        by_normed = grad * normed
        mean = (by_normed @ wide_weight).div_(hidden.shape[-1]).unsqueeze(-1)
        grad_hidden = (grad * wide_weight).addcmul_(normed, mean, value=-1).mul_(scale)
        grad_weight = by_normed.flatten(0, -2).sum(0)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None


def native_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
) -> torch.nn.Module:
    """Build PyTorch's RMSNorm or LayerNorm, with gradients summed over sequence-parallel ranks."""
    cls = {"RMSNorm": RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
    norm = cls(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


class TorchNativeSpecProvider(LocalSpecProvider):
    """Upstream's local modules, except for attention, norms and experts."""

    def __init__(self, backend: BackEnd) -> None:
        self.kept = backend.kept

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        """Return the module for norms."""
        return native_norm

    def core_attention(self) -> type:
        """Return the module for attention."""
        return super().core_attention() if "attention" in self.kept else ScaledDotProductAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Return the module for experts."""
        if "experts" in self.kept:
            return super().grouped_mlp_modules(moe_use_grouped_gemm)
        return GroupedExperts


def with_native_modules(
    spec: TransformerBlockSubmodules, backend: BackEnd, config: TransformerConfig
) -> TransformerBlockSubmodules:
    """Copy upstream's local spec with this back end's modules in it.

    The functions of upstream that build the spec choose their provider themselves, so ours cannot
    be passed to them.
    """
    provider = TorchNativeSpecProvider(backend)
    layers: dict[int, Any] = {}  # by id, because upstream shares one spec object among layers
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
    names = submodules.sharded_state_dict_keys_map
    if attention.module is MLASelfAttention:
        attention.module = LatentAttention
        names = names_in_checkpoints(names)
    parts = {
        name: _norm_or(provider, getattr(attention.submodules, name))
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm")
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
        sharded_state_dict_keys_map=names,
    )
    return layer


def _norm_or(provider: TorchNativeSpecProvider, norm: Any) -> Any:
    """Return our norm in place of one that ``normalization`` names, and any other as it is."""
    return norm if norm in (None, IdentityOp, L2Norm) else provider.layer_norm(rms_norm=True)
