"""The model for Transformers: :class:`DynMoEModel`, and with an output layer the language model.

Its layers are in ``layers_dynmoe``. Exported models ship with this file and the files of
``huggingface``, ``layers``, ``kernels`` and ``routing`` that it imports: selection, normalization
and losses of the routing are the ones that Megatron trains with.

Dimension letters, in names as a suffix (``hidden_BSD``): those of ``layers.moe``, and
    K  positions with those in the cache
    N  attention heads
"""

import importlib
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from megatron_dynmoe.huggingface.budgets_dynmoe import GeneratesWithBudgets, thresholds_of
from megatron_dynmoe.huggingface.configuration_dynmoe import DynMoEModelConfig
from megatron_dynmoe.huggingface.layers_dynmoe import (
    DynMoEAttention,
    DynMoEDecoderLayer,
    DynMoEExperts,
    DynMoERotaryEmbedding,
    DynMoERouter,
)
from megatron_dynmoe.huggingface.loss_dynmoe import language_loss, next_tokens
from megatron_dynmoe.huggingface.masking_dynmoe import check_keywords, read_rows, serves_itself

logger = logging.getLogger(__name__)


@dataclass
class DynMoEModelOutput(BaseModelOutputWithPast):
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

    router_logits: tuple[Tensor, ...] | None = None
    experts_per_token: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class DynMoECausalLMOutput(CausalLMOutputWithPast):
    """Outputs of the language model; those not listed are as in :class:`DynMoEModelOutput`.

    Attributes:
        loss: a scalar, with labels: mean cross entropy, plus ``aux_loss`` in training mode. In
            evaluation mode its exponential is the perplexity.
        logits: [B, S, vocabulary].
    """

    router_logits: tuple[Tensor, ...] | None = None
    experts_per_token: Tensor | None = None
    aux_loss: Tensor | None = None


class DynMoEPreTrainedModel(PreTrainedModel):
    """What both models share: initialization, loading and saving."""

    config_class = DynMoEModelConfig
    config: DynMoEModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DynMoEDecoderLayer,
        "attentions": DynMoEAttention,
    }
    _no_split_modules = ["DynMoEDecoderLayer"]  # noqa: RUF012
    # Set by the package: what makes a saved folder one that loads without it.
    auto_map: ClassVar[dict[str, str] | None] = None
    write_code: ClassVar[Callable[[Path], None] | None] = None
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Yes: Transformers searches this file for the decorator that ``layers_dynmoe`` has."""
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Check a name. Without one it is our loop, and not ``grouped_mm``, which computes E."""
        return super().get_correct_experts_implementation(requested_experts or "eager")

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DynMoEExperts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std)
        elif isinstance(module, DynMoERouter):
            init.normal_(module.weight, std=std)
            if self.config.normalization == "drn":
                theta = 1.0 if self.config.theta is None else self.config.theta[module.layer]
                init.constant_(module.theta_offset, theta - 1)

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

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Save like every model, with the config's theta as it is, and with the model's code."""
        self.config.theta = self.theta
        write_code = type(self).write_code
        if write_code is not None:
            self.config.auto_map = self.auto_map
            if is_main_process and not os.path.isfile(save_directory):
                Path(save_directory).mkdir(parents=True, exist_ok=True)
                write_code(Path(save_directory))
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)


class DynMoEModel(DynMoEPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: DynMoEModelConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DynMoEDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DynMoERotaryEmbedding(config)
        if serves_itself(config) and not str(config._attn_implementation).startswith("paged|"):
            warn_of_slots(config)  # an engine with experts of its own, as vLLM
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        experts_per_token: Any = None,
        output_aux_loss: bool = False,
        **kwargs: Any,
    ) -> DynMoEModelOutput:
        """Run the layers.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, K], 0 for padding, with one entry for each position in the cache
                and of this forward; or [B or 1, N or 1, S, K], bool, True where a token sees
                another, or floating-point numbers to add to the scores; None: no padding.
            position_ids: [B or 1, S]; if None, counted from the first token that is not padding.
                If they do not increase by one, the next of several packed documents begins, which
                sees nothing of the earlier ones.
            past_key_values: the cache of earlier positions; not with packed documents.
            inputs_embeds: [B, S, D], instead of ``input_ids``.
            use_cache: whether to return a cache; if None, the config decides, except in training
                or with packed documents, which return none.
            output_router_logits: see the output; if None, the config decides.
            experts_per_token: a budget: the mean that the ``budget_curve``'s threshold is for, one
                number or, in a list or tensor, one for each of B sequences; None: the config's.
            output_aux_loss: whether to compute the losses of the routing.
            kwargs: ``output_hidden_states`` and ``output_attentions`` (see the output), and what
                the implementation of attention takes.

        Raises:
            TypeError: a keyword is unknown.
            ValueError: the inputs do not fit together, the attention cannot honor one, or the
                curve does not have a budget.
        """
        config = self.config
        check_keywords(kwargs, config, type(self).forward)
        kwargs.pop("output_hidden_states", None)
        wants_attentions = kwargs.pop("output_attentions", config.output_attentions)
        if wants_attentions and config._attn_implementation != "eager":
            raise ValueError(
                "output_attentions is set, which only eager attention returns: load the model "
                "with attn_implementation='eager'."
            )
        output_router_logits = _or(output_router_logits, config.output_router_logits)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: give one of the two.")

        # 1. Embed
        hidden_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        # 2. Positions, documents, mask and cache, the same for every layer
        rows = read_rows(
            config, attention_mask, position_ids, past_key_values, hidden_BSD, use_cache, kwargs
        )
        by_default = config.use_cache and not self.training and not rows.is_packed
        if _or(use_cache, by_default) and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        rotary = self.rotary_emb(hidden_BSD, rows.position_ids)

        # 3. Layers
        threshold = thresholds_of(config, experts_per_token, hidden_BSD, self.training)
        router_logits, counts, losses = [], [], []
        for layer in self.layers:
            hidden_BSD, logits_BSE, counts_BS, loss = layer(
                hidden_BSD,
                rotary,
                rows.mask,
                rows.valid_BS,
                output_aux_loss or output_router_logits,
                threshold,
                past_key_values=past_key_values,
                position_ids=rows.position_ids,
                **kwargs,
            )
            if counts_BS is not None:
                router_logits.append(logits_BSE)
                counts.append(counts_BS)
                losses.append(loss)

        # 4. Norm
        return DynMoEModelOutput(
            last_hidden_state=self.norm(hidden_BSD),
            past_key_values=past_key_values,
            router_logits=tuple(router_logits) if output_router_logits else None,
            experts_per_token=torch.stack(counts) if counts else rows.position_ids.new_zeros(0),
            aux_loss=torch.stack(losses).sum() if losses and losses[0] is not None else None,
        )


class DynMoEForCausalLM(DynMoEPreTrainedModel, GeneratesWithBudgets, GenerationMixin):
    """The language model: :class:`DynMoEModel` and the output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    # The loss is a mean over this batch, so Trainer has to divide when it accumulates gradients.
    accepts_loss_kwargs = False

    def __init__(self, config: DynMoEModelConfig) -> None:
        super().__init__(config)
        self.model = DynMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Count, with padding at the position before it, so that what follows it goes on there.

        Upstream puts padding at 0, and text that follows padding on the right at 1.
        """
        positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return positions.cummax(dim=-1).values if positions.dim() == 2 else positions

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        experts_per_token: Any = None,
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
            shift_labels: [B, S] int64, what each token has to predict, already shifted, as Trainer
                gives it if a sequence is split over devices; used instead of ``labels``. (It has no
                place among the arguments, because Trainer takes each one with that word for a
                label that every batch has.)
            The others: see :meth:`DynMoEModel.forward`.

        Raises:
            TypeError: a keyword is unknown.
            ValueError: the inputs do not fit together, or the attention cannot honor one.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        check_keywords(kwargs, self.config, type(self).forward)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            experts_per_token=experts_per_token,
            output_aux_loss=labels is not None or shift_labels is not None,
            **(kwargs | {"return_dict": True}),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(outputs.last_hidden_state[:, kept]), None
        predicting = logits
        if shift_labels is None and labels is not None:
            shift_labels = next_tokens(labels, position_ids, attention_mask)
            predicting = logits[:, :-1]
        if shift_labels is not None:
            aux_loss = outputs.aux_loss if self.training else None
            loss = language_loss(predicting, shift_labels, aux_loss, num_items_in_batch)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return DynMoECausalLMOutput(loss=loss, logits=logits, **rest)


# With label smoothing Trainer computes the loss itself. It shifts the labels only for the classes
# of this list, and would teach those of any other model to repeat each token.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[DynMoEModelConfig.model_type] = DynMoEForCausalLM.__name__


def warn_of_slots(config: DynMoEModelConfig) -> None:
    """Say what an engine whose experts compute every slot of a token pays without a cap."""
    if config.has_experts and config.routing != "top_k" and config.cap(training=False) is None:
        logger.warning(
            f"inference_max_experts_per_token is not set, so this engine computes all "
            f"{config.num_experts} experts for every token, however few it uses: set it in "
            "config.json, or start vLLM with --hf-overrides "
            "'{\"inference_max_experts_per_token\": N}' "
            "(megatron-dynmoe's docs/serving.md says which N)."
        )


def weights_in_place(module: nn.Module) -> AbstractContextManager[None]:
    """Give a module that ``device_map`` offloads its weights for the duration of the block."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    # A plain import would make every user of a shipped copy install accelerate.
    return importlib.import_module("accelerate.utils").align_module_device(module)


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value
