"""The layers of the model for Transformers: attention, and experts that are chosen as in training.

Attention, masks, rotary tables and experts go through Transformers' own interfaces, so whatever
implements one of them runs this model. Dimension letters are those of ``layers.moe``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeAttention,
    Glm4MoeMLP,
    Glm4MoeRotaryEmbedding,
)
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from megatron_dynmoe.huggingface.configuration_dynmoe import DynMoEModelConfig
from megatron_dynmoe.layers.moe import Choice, Experts, Gate, MoELayer
from megatron_dynmoe.layers.rules import LAYER_RULES, chooser
from megatron_dynmoe.routing.keep_dtype import KeepDtype


class DynMoERouter(Gate):
    """Routes by the settings in the config, which it reads at every forward."""

    def __init__(self, config: DynMoEModelConfig, layer: int) -> None:
        sizes = config.hidden_size, config.num_experts
        super().__init__(*sizes, config.normalization == "drn", config.extra_logits)
        self.config, self.layer = config, layer

    def choice(self) -> Choice:
        """See :class:`Choice`."""
        config, rule = self.config, None
        given = vars(config)  # every layer asks, and reading an attribute of a config takes long
        if given["routing"] == "top_k":
            threshold, most = None, config.num_experts_per_tok
        elif given["routing"] in LAYER_RULES:
            threshold, most = None, config.cap(self.training)
            rule = chooser(given, self.layer, most, self.weight.device)
        else:
            threshold, most = config.threshold_and_cap(self.layer, self.training)
        return Choice(
            threshold,
            most,
            normalized=given["normalization"] == "drn",
            renormalize=given["weights"] == "renormalized",
            dtype=getattr(torch, given["router_dtype"]),
            rule=rule,
        )


@use_experts_implementation
class DynMoEExperts(Experts):
    """The experts of a layer. ``experts_implementation`` chooses how they are computed.

    ``eager``, the default, is the loop of :class:`Experts`: exact, and without a cost for slots
    that a token does not use. Transformers' own compute every slot.
    """

    config: DynMoEModelConfig

    def __init__(self, config: DynMoEModelConfig) -> None:
        sizes = config.hidden_size, config.num_experts, config.moe_intermediate_size
        super().__init__(*sizes, init_std=None)
        self.act_fn = F.silu

    @property
    def sums_itself(self) -> bool:
        """Whether neither Transformers nor a compiler's graph computes the experts."""
        return self.config._experts_implementation == "eager" and not torch.compiler.is_compiling()

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor | None, weights: Tensor) -> Tensor:
        """See :meth:`Experts.forward`."""
        if torch.compiler.is_compiling():  # which cannot follow a loop over as many rows as it is
            return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_TD, ids_TK, weights)
        return super().forward(hidden_TD, ids_TK, weights)


class DynMoESparseMLP(MoELayer):
    """Mixture of experts: router, experts, and, if the model has one, the shared expert."""

    def __init__(self, config: DynMoEModelConfig, layer: int) -> None:
        super().__init__(DynMoERouter(config, layer), DynMoEExperts(config), losses=config)
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = Glm4MoeMLP(config, config.shared_expert_intermediate_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)


class DynMoERotaryEmbedding(KeepDtype, Glm4MoeRotaryEmbedding):
    """Cosine and sine of positions, [B or 1, S, rotary size], from frequencies in float32."""


class DynMoEAttention(Glm4MoeAttention):
    """Causal attention with grouped queries and rotary positions in the first part of a head.

    Transformers' own, except for the norms of queries and keys, which round once.
    """

    def __init__(self, config: DynMoEModelConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)


class DynMoEPlainAttention(DynMoEAttention):
    """The same without norms if all of a head turns: GLM's would split and join heads for nothing.

    vLLM reads the source of a class's own ``forward``, so none of ours may stand in between.
    """

    forward = MixtralAttention.forward


class DynMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts or a dense MLP, each after a norm and inside a residual."""

    def __init__(self, config: DynMoEModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        turned = config.rope_parameters.get("partial_rotary_factor", 1.0)
        attention = DynMoEPlainAttention if turned == 1 and not config.qk_norm else DynMoEAttention
        self.self_attn = attention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_sparse = config.is_sparse(layer_idx)
        if self.is_sparse:
            self.mlp: nn.Module = DynMoESparseMLP(config, layer_idx)
        else:
            self.mlp = Glm4MoeMLP(config)

    def forward(
        self,
        hidden_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Any,
        valid_BS: Tensor | None,
        with_loss: bool,
        threshold: Tensor | float | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return output, router logits, experts per token, routing loss.

        The tuple is flat: recomputation would lose the gradients of tensors in other containers.
        """
        attended_BSD, _ = self.self_attn(
            self.input_layernorm(hidden_BSD),
            position_embeddings=rotary,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_BSD = hidden_BSD + self._dropout(attended_BSD)
        normed_BSD = self.post_attention_layernorm(hidden_BSD)
        logits_BSE = counts_BS = loss = None
        if self.is_sparse:
            mlp_BSD, logits_BSE, counts_BS, loss = self.mlp(
                normed_BSD, valid_BS, with_loss, threshold
            )
        else:
            mlp_BSD = self.mlp(normed_BSD)
        return hidden_BSD + self._dropout(mlp_BSD), logits_BSE, counts_BS, loss

    def _dropout(self, values: Tensor) -> Tensor:
        return F.dropout(values, self.hidden_dropout) if self.training else values
