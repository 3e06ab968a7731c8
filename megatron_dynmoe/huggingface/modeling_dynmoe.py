"""The model for Transformers: attention and a mixture of experts that routes as in training.

Exported models ship with this file and the files of ``huggingface`` and ``routing`` that it
imports: selection, normalization and losses are the ones that Megatron trains with.

Dimension letters, in names as a suffix (``probs_TE``):
    T  tokens, ``sequence * S + position``
    B  sequences
    S  positions of this forward
    K  positions with those in the cache
    N  attention heads
    H  size of a head
    E  experts
    D  hidden size
    F  ffn size of an expert
    R  tokens of one expert
"""

import importlib
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from megatron_dynmoe.huggingface.configuration_dynmoe import DynMoEModelConfig
from megatron_dynmoe.huggingface.masking_dynmoe import (
    causal_mask,
    check_positions,
    count_positions,
    find_documents,
    refuse_unknown,
    valid_positions,
)
from megatron_dynmoe.routing.losses import (
    count_tokens,
    dynamic_loss,
    load_balance_loss,
    sum_by_sequence,
    sum_entropy,
)
from megatron_dynmoe.routing.normalize import normalize
from megatron_dynmoe.routing.select import select, weigh

logger = logging.getLogger(__name__)


@dataclass
class DynMoEModelOutput(ModelOutput):
    """Outputs of the model without its head.

    Attributes:
        last_hidden_state: [B, S, D], after the final norm.
        past_key_values: the cache, with ``use_cache``.
        hidden_states: the input of every layer and the last hidden state, each [B, S, D], with
            ``output_hidden_states``.
        attentions: per layer, [B, N, S, K], with ``output_attentions`` and eager attention.
        router_logits: per MoE layer, [B, S, E] in the router's dtype, with
            ``output_router_logits``: the input of the softmax, so after normalization.
        experts_per_token: [MoE layers, B, S] int64, 0 for padding.
        aux_loss: a float32 scalar, with ``output_router_logits`` or labels: both losses of the
            routing times their coefficients, summed over layers as in training.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    experts_per_token: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class DynMoECausalLMOutput(ModelOutput):
    """Outputs of the language model; those not listed are as in :class:`DynMoEModelOutput`.

    Attributes:
        loss: a scalar, with labels: mean cross entropy plus ``aux_loss``.
        logits: [B, S, vocabulary].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    experts_per_token: Tensor | None = None
    aux_loss: Tensor | None = None


class RouterOutput(NamedTuple):
    """A router's decision: logits and probs [T, E] and weights [T, E] in its dtype, map bool."""

    logits_TE: Tensor
    probs_TE: Tensor
    map_TE: Tensor
    weights_TE: Tensor


class DynMoERouter(nn.Module):
    """Gate, normalize, softmax, select, weigh: the same steps as in Megatron's router."""

    def __init__(self, config: DynMoEModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.normalization == "drn":
            self.theta_offset = nn.Parameter(torch.zeros(1))

    @property
    def theta(self) -> Tensor:
        """The scale of the normalized logits, [1] float32."""
        return 1 + self.theta_offset.float()

    def forward(self, hidden_TD: Tensor) -> RouterOutput:
        """Choose the experts of each token."""
        config, dtype = self.config, getattr(torch, self.config.router_dtype)

        # 1. Gate and normalize
        with torch.autocast(device_type=hidden_TD.device.type, enabled=False):
            logits_TE = F.linear(hidden_TD.to(dtype), self.weight.to(dtype))
        if config.normalization == "drn":
            logits_TE = normalize(logits_TE, self.theta).to(dtype)
        probs_TE = torch.softmax(logits_TE, dim=-1)

        # 2. Select; the threshold is compared in float32, whatever the router's dtype is
        if config.routing == "top_k":
            map_TE = select_top_k(probs_TE, config.num_experts_per_tok)
        else:
            threshold, cap = config.threshold_and_cap(self.layer, self.training)
            map_TE = select(probs_TE.float(), threshold, cap)

        # 3. Weigh
        weights_TE = weigh(probs_TE, map_TE, renormalize=config.weights == "renormalized")
        return RouterOutput(logits_TE, probs_TE, map_TE, weights_TE)


class DynMoEExperts(nn.Module):
    """The SwiGLU experts of a layer; each multiplies the rows of its tokens at once."""

    def __init__(self, config: DynMoEModelConfig) -> None:
        super().__init__()
        num_experts, ffn = config.num_experts, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * ffn, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, ffn))

    def forward(self, hidden_TD: Tensor, map_TE: Tensor, weights_TE: Tensor) -> Tensor:
        """Sum each token's experts with their weights, in the order of the experts.

        The experts run one after another, so each adds to a token at most once: the order of the
        sum is fixed on every device, and a token's result does not depend on the rest of the batch.
        """
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)  # sum's dtype, rounded once
        output_TD = torch.zeros_like(hidden_TD, dtype=dtype)
        map_ET = map_TE.t()
        rows_per_expert = map_ET.sum(dim=-1).tolist()
        tokens = map_ET.nonzero()[:, 1].split(rows_per_expert)
        weights = weights_TE.t()[map_ET].unsqueeze(-1).split(rows_per_expert)
        # With unbind, the gradient of experts[i] is not a tensor of zeros for all experts.
        projections = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        for expert, (gate_up, down) in enumerate(projections):
            if rows_per_expert[expert]:
                rows_RD = hidden_TD.index_select(0, tokens[expert])
                gate_RF, up_RF = F.linear(rows_RD, gate_up).chunk(2, dim=-1)
                rows_RD = F.linear(F.silu(gate_RF) * up_RF, down) * weights[expert]
                output_TD.index_add_(0, tokens[expert], rows_RD.to(dtype))
        return output_TD.to(hidden_TD.dtype)


class DynMoEMLP(nn.Module):
    """A dense SwiGLU layer, which also serves as the shared expert."""

    def __init__(self, hidden_size: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden_size, bias=False)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(hidden_TD)) * self.up_proj(hidden_TD))


class DynMoESparseMLP(nn.Module):
    """Mixture of experts: router, experts, and, if the model has one, the shared expert."""

    def __init__(self, config: DynMoEModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.router = DynMoERouter(config, layer)
        self.experts = DynMoEExperts(config)
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = DynMoEMLP(
                config.hidden_size, config.shared_expert_intermediate_size
            )
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self, hidden_BSD: Tensor, valid_BS: Tensor | None, with_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Route, compute, combine.

        Args:
            hidden_BSD: [B, S, D].
            valid_BS: [B, S] bool, False for padding, which uses no expert; None: no padding.
            with_loss: whether to compute the losses of the routing.

        Returns:
            Output [B, S, D], router logits [B, S, E], experts per token [B, S], loss or None.
        """
        hidden_TD = hidden_BSD.flatten(0, 1)

        # 1. Route
        routing = self.router(hidden_TD)
        map_TE = routing.map_TE
        if valid_BS is not None:
            map_TE = map_TE & valid_BS.flatten().unsqueeze(-1)

        # 2. Compute and combine
        output_TD = self.experts(hidden_TD, map_TE, routing.weights_TE)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(hidden_TD)
            if self.shared_expert_gate is not None:
                shared_TD = shared_TD * torch.sigmoid(self.shared_expert_gate(hidden_TD))
            output_TD = output_TD + shared_TD

        # 3. Losses and counts
        shape = (*hidden_BSD.shape[:2], self.config.num_experts)
        loss = None
        if with_loss:
            loss = routing_loss(
                self.config, routing.probs_TE.view(shape), map_TE.view(shape), valid_BS
            )
        counts_BS = map_TE.sum(dim=-1).view(shape[:2])
        return output_TD.view_as(hidden_BSD), routing.logits_TE.view(shape), counts_BS, loss


class DynMoEAttention(nn.Module):
    """Causal attention with grouped queries and split-half rotary embeddings."""

    def __init__(self, config: DynMoEModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        head_dim, bias = config.head_dim, config.attention_bias
        num_queries = config.num_attention_heads * head_dim
        num_keys = config.num_key_value_heads * head_dim
        self.q_proj = nn.Linear(config.hidden_size, num_queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, num_keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, num_keys, bias=bias)
        self.o_proj = nn.Linear(num_queries, config.hidden_size, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_BSK: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; return [B, S, D] and, with eager attention, the probabilities [B, N, S, K]."""
        # 1. Project to [B, N, S, H]
        shape = (*hidden_BSD.shape[:2], -1, self.config.head_dim)
        query = self.q_norm(self.q_proj(hidden_BSD).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_BSD).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_BSD).view(shape).transpose(1, 2)

        # 2. Rotate, and add what the cache holds
        query, key = rotate(query, rotary), rotate(key, rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer)
        queries_per_key = query.shape[1] // key.shape[1]
        if queries_per_key > 1:
            key = key.repeat_interleave(queries_per_key, dim=1)
            value = value.repeat_interleave(queries_per_key, dim=1)

        # 3. Attend
        dropout = self.config.attention_dropout if self.training else 0.0
        is_causal = mask_BSK is None and query.shape[2] > 1
        mask = None if mask_BSK is None else mask_BSK.unsqueeze(1)
        if self.config._attn_implementation == "eager":
            context, probs = eager_attention(query, key, value, mask, is_causal, dropout)
        else:
            probs = None
            context = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
            )
        return self.o_proj(context.transpose(1, 2).flatten(2)), probs


class DynMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts or a dense MLP, each after a norm and inside a residual."""

    def __init__(self, config: DynMoEModelConfig, layer: int) -> None:
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DynMoEAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_sparse = config.is_sparse(layer)
        if self.is_sparse:
            self.mlp: nn.Module = DynMoESparseMLP(config, layer)
        else:
            self.mlp = DynMoEMLP(config.hidden_size, config.intermediate_size or 0)

    def forward(
        self,
        hidden_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_BSK: Tensor | None,
        valid_BS: Tensor | None,
        with_loss: bool,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return output, attention probabilities, router logits, experts per token, routing loss.

        The tuple is flat: recomputation would lose the gradients of tensors in other containers.
        """
        attended_BSD, attention = self.self_attn(
            self.input_layernorm(hidden_BSD), rotary, mask_BSK, past_key_values
        )
        hidden_BSD = hidden_BSD + self._dropout(attended_BSD)
        normed_BSD = self.post_attention_layernorm(hidden_BSD)
        logits_BSE = counts_BS = loss = None
        if self.is_sparse:
            mlp_BSD, logits_BSE, counts_BS, loss = self.mlp(normed_BSD, valid_BS, with_loss)
        else:
            mlp_BSD = self.mlp(normed_BSD)
        return hidden_BSD + self._dropout(mlp_BSD), attention, logits_BSE, counts_BS, loss

    def _dropout(self, values: Tensor) -> Tensor:
        return F.dropout(values, self.hidden_dropout, self.training)


class DynMoEPreTrainedModel(PreTrainedModel):
    """What both models share: initialization, loading and saving."""

    config_class = DynMoEModelConfig
    config: DynMoEModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DynMoEDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DynMoEExperts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, DynMoERouter):
            nn.init.normal_(module.weight, std=std)
            if self.config.normalization == "drn":
                theta = 1.0 if self.config.theta is None else self.config.theta[module.layer]
                nn.init.constant_(module.theta_offset, theta - 1)

    @property
    def theta(self) -> list[float | None] | None:
        """Theta of every layer, None for dense layers; None without normalization.

        If the model is on the meta device and has no numbers, theta is the config's.
        """
        if self.config.normalization != "drn":
            return None
        theta: list[float | None] = [None] * self.config.num_hidden_layers
        for module in self.modules():
            if isinstance(module, DynMoERouter):
                with weights_in_place(module):
                    if module.theta_offset.is_meta:
                        return self.config.theta
                    theta[module.layer] = module.theta.item()
        return theta

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load like every model; warn if the config's theta is not that of the weights."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        stated = model.config.theta or [None] * model.config.num_hidden_layers
        model.config.theta = model.theta
        for layer, (said, theta) in enumerate(zip(stated, model.theta or [], strict=False)):
            # Rounding the offset to bfloat16 cannot bring them this far apart.
            if said is not None and abs(said - theta) > 2**-8 * abs(theta - 1) + 1e-6:
                logger.warning(
                    f"theta[{layer}] is {said:g} in the config and {theta:g} in the weights: the "
                    "weights are used."
                )
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save like every model, after the config's theta has been updated."""
        self.config.theta = self.theta
        super().save_pretrained(*args, **kwargs)


class DynMoEModel(DynMoEPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: DynMoEModelConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DynMoEDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        output_aux_loss: bool = False,
        **kwargs: Any,
    ) -> DynMoEModelOutput:
        """Run the layers.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, K], 0 for padding, with one entry for each position in the cache
                and of this forward; None: no padding.
            position_ids: [B or 1, S]; if None, counted from the first token that is not padding.
                If they do not increase by one, the next of several packed documents begins, which
                sees nothing of the earlier ones.
            past_key_values: the cache of earlier positions; not with packed documents.
            inputs_embeds: [B, S, D], instead of ``input_ids``.
            use_cache: whether to return a cache; if None, the config decides, except in training
                or with packed documents, which return none.
            output_hidden_states, output_attentions, output_router_logits: see the outputs; if
                None, the config decides.
                config's if None.
            output_aux_loss: whether to compute the losses of the routing.

        Raises:
            TypeError: a keyword is unknown.
            ValueError: the inputs do not fit together.
        """
        refuse_unknown(kwargs, type(self).forward)
        config = self.config
        output_hidden_states = _or(output_hidden_states, config.output_hidden_states)
        output_attentions = _or(output_attentions, config.output_attentions)
        output_router_logits = _or(output_router_logits, config.output_router_logits)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: give one of the two.")
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                "output_attentions is set, which only eager attention returns: load the model "
                "with attn_implementation='eager'."
            )

        # 1. Embed
        hidden_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        # 2. Positions, documents, cache and mask, the same for every layer
        num_cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        num_positions = hidden_BSD.shape[1]
        valid_BK = valid_positions(attention_mask, num_cached + num_positions)
        valid_BS = None if valid_BK is None else valid_BK[:, num_cached:]
        documents_BS = None
        if position_ids is None:
            position_ids = count_positions(valid_BK, num_cached, hidden_BSD)
        else:
            check_positions(position_ids, valid_BK, num_cached, hidden_BSD)
            documents_BS = find_documents(position_ids, valid_BS)
        if documents_BS is not None and (use_cache or past_key_values is not None):
            raise ValueError(
                "position_ids do not go on by one, so several documents are packed in a row, and "
                "a cache, which does not tell them apart, is to be used: give use_cache=False and "
                "no past_key_values, or one document a row."
            )
        by_default = config.use_cache and not self.training and documents_BS is None
        if _or(use_cache, by_default) and past_key_values is None:
            past_key_values = DynamicCache()
        rotary = rotary_tables(config, position_ids, hidden_BSD.dtype)
        mask_BSK = causal_mask(valid_BK, documents_BS, num_cached, hidden_BSD)

        # 3. Layers
        hidden_states, attentions, router_logits, counts, losses = [], [], [], [], []
        for layer in self.layers:
            hidden_states.append(hidden_BSD)
            hidden_BSD, attention, logits_BSE, counts_BS, loss = layer(
                hidden_BSD,
                rotary,
                mask_BSK,
                valid_BS,
                output_aux_loss or output_router_logits,
                past_key_values=past_key_values,
            )
            attentions.append(attention)
            if counts_BS is not None:
                router_logits.append(logits_BSE)
                counts.append(counts_BS)
                losses.append(loss)

        # 4. Norm
        hidden_BSD = self.norm(hidden_BSD)
        hidden_states.append(hidden_BSD)
        return DynMoEModelOutput(
            last_hidden_state=hidden_BSD,
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(router_logits) if output_router_logits else None,
            experts_per_token=torch.stack(counts) if counts else position_ids.new_zeros(0),
            aux_loss=torch.stack(losses).sum() if losses and losses[0] is not None else None,
        )


class DynMoEForCausalLM(DynMoEPreTrainedModel, GenerationMixin):
    """The language model: :class:`DynMoEModel` and the output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # The loss is a mean over this batch, so Trainer has to divide when it accumulates gradients.
    accepts_loss_kwargs = False

    def __init__(self, config: DynMoEModelConfig) -> None:
        super().__init__(config)
        self.model = DynMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> DynMoECausalLMOutput:
        """Run the model and, if labels are given, compute the training losses.

        Args:
            labels: [B, S] int64, the input's own tokens, which are shifted here; -100: no loss. No
                token predicts the first one of the next packed document, whatever its label.
            logits_to_keep: how many of the last positions get logits, or which; 0: all.
            num_items_in_batch: predicted tokens of all batches whose losses will be added up; then
                the loss is this batch's share and not its mean.
            The others: see :meth:`DynMoEModel.forward`.

        Raises:
            TypeError: a keyword is unknown.
            ValueError: the inputs do not fit together.
        """
        refuse_unknown(kwargs, type(self).forward)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
            output_aux_loss=labels is not None,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            targets = next_tokens(labels, position_ids, attention_mask).to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
            if outputs.aux_loss is not None:
                loss = loss + outputs.aux_loss.to(loss.device)
            if num_items_in_batch is not None:
                loss = loss * ((targets != -100).sum() / num_items_in_batch)
        return DynMoECausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            experts_per_token=outputs.experts_per_token,
            aux_loss=outputs.aux_loss,
        )


def weights_in_place(module: nn.Module) -> AbstractContextManager[None]:
    """Give a module that ``device_map`` offloads its weights for the duration of the block."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    # A plain import would make every user of a shipped copy install accelerate.
    return importlib.import_module("accelerate.utils").align_module_device(module)


def select_top_k(probs_TE: Tensor, num_experts: int) -> Tensor:
    """The map [T, E] of each token's ``num_experts`` most probable experts; ties go by index."""
    with torch.no_grad():
        order_TE = probs_TE.sort(dim=-1, descending=True, stable=True).indices
        map_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
        return map_TE.scatter_(-1, order_TE[:, :num_experts], True)


def routing_loss(
    config: DynMoEModelConfig, probs_BSE: Tensor, map_BSE: Tensor, valid_BS: Tensor | None
) -> Tensor:
    """Balance and dynamic loss of one layer times their coefficients: a float32 scalar.

    The scope ``global_aux_loss`` works like ``aux_loss``: over all tokens of this batch.
    """
    # The losses order tokens as Megatron does: position * B + sequence.
    num_experts = probs_BSE.shape[-1]
    probs_TE = probs_BSE.transpose(0, 1).reshape(-1, num_experts).float()
    map_TE = map_BSE.transpose(0, 1).reshape(-1, num_experts)
    valid_T = None if valid_BS is None else valid_BS.t().reshape(-1)

    num_sequences = probs_BSE.shape[0] if config.balance_loss == "seq_aux_loss" else 1
    tokens_B = count_tokens(map_TE, num_sequences, valid_T)
    loss = config.dynamic_loss_coeff * dynamic_loss(sum_entropy(probs_TE, valid_T), tokens_B)
    if config.balance_loss != "none":
        prob_sums_BE, assignments_BE = (
            sum_by_sequence(values_TE, num_sequences, valid_T) for values_TE in (probs_TE, map_TE)
        )
        fractions_BE = assignments_BE.float() / tokens_B.clamp(min=1).unsqueeze(-1)
        loss = loss + config.balance_loss_coeff * load_balance_loss(
            prob_sums_BE, fractions_BE, tokens_B
        )
    return loss


def next_tokens(
    labels: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    """The token that each one but a row's last has to predict, [B, S - 1]; -100: none."""
    targets = labels[:, 1:]
    if position_ids is None:
        return targets
    valid_BS = None if attention_mask is None else attention_mask[:, -labels.shape[1] :].bool()
    documents_BS = find_documents(position_ids, valid_BS)
    if documents_BS is None:
        return targets
    return targets.masked_fill((documents_BS.diff() != 0).to(targets.device), -100)


def rotary_tables(
    config: DynMoEModelConfig, position_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [B or 1, 1, S, rotary size], computed in float32."""
    rope = config.rope_parameters
    size = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=position_ids.device) / size
    frequencies = 1.0 / rope["rope_theta"] ** exponents
    angles = position_ids.unsqueeze(-1).float() * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(values: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first part of each head of [B, N, S, H] and pass the rest."""
    cosine, sine = rotary
    size = cosine.shape[-1]
    rotated, passed = values[..., :size], values[..., size:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((rotated, passed), dim=-1)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Eager attention with a float32 softmax; output [B, N, S, H] and probs [B, N, S, K]."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if is_causal:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(probs, dropout) @ value, probs


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value
