"""Latent attention (MLA) on ``torch_native``: heads of two sizes, and what is refused.

With ``--multi-latent-attention`` a head of queries and keys has as many numbers as
``--qk-head-dim`` and ``--qk-pos-emb-head-dim`` together, and one of values ``--v-head-dim``.
Projections, norms and rotary positions are upstream's; only attention itself is ours. PyTorch's
attention takes such heads, upstream's ``local`` does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megatron_dynmoe.settings.messages.refusals import FlagError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class LatentAttention(MLASelfAttention):
    """Upstream's latent attention, with the whole gradient of the keys' positions.

    Without Transformer Engine, tensor-parallel ranks share the projections to latent vectors, and
    upstream gathers their parts. The part of a key that carries its position goes to the heads of
    all ranks, but upstream does not sum its gradient over the ranks. Here the projection looks as
    if it were not split, and upstream's code for that case sums.
    """

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Project to latent vectors.

        Args:
            hidden_states: [S, B, D]; [S / T, B, D] if T ranks are sequence-parallel.

        Returns:
            The latent queries, and the latent keys and values with the keys' positions behind them:
            [S, B, kv_lora_rank + qk_pos_emb_head_dim], or S / T of them.
        """
        queries, keys_and_values = super()._qkv_down_projection(hidden_states)
        latent, positions = self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim
        if keys_and_values.shape[-1] == latent + positions:
            return queries, keys_and_values
        whole = gather_from_tensor_model_parallel_region(keys_and_values)
        if self.config.sequence_parallel:
            return queries, scatter_to_sequence_parallel_region(whole)
        latent_part, position_part = whole.split([latent, positions], dim=-1)
        position_part = copy_to_tensor_model_parallel_region(position_part)
        return queries, torch.cat([latent_part, position_part], dim=-1)


def names_in_checkpoints(local: dict[str, str]) -> dict[str, str]:
    """Name norms in checkpoints as with Transformer Engine, so that either back end loads them.

    Args:
        local: upstream's mapping for its local layers, of prefixes to those in checkpoints. It is
            made for other attention: the norm before the layer is in no linear layer here.
    """
    names = {own: saved for own, saved in local.items() if own != "input_layernorm."}
    for part in ("q", "kv"):
        norm = f"self_attention.{part}_layernorm."
        names[norm] = f"self_attention.linear_{part}_up_proj.layer_norm_"
    return names


def padded(*tensors: Tensor) -> list[Tensor]:
    """Pad heads with zeros to the size of the largest, which changes neither scores nor values.

    Args:
        tensors: queries, keys and values, [S, B, N, H] with any H.

    Returns:
        The same with one H. The numbers of an output beyond the values' own size are zero.
    """
    size = max(tensor.shape[3] for tensor in tensors)
    return [torch.nn.functional.pad(tensor, (0, size - tensor.shape[3])) for tensor in tensors]


def needs_one_size(config: TransformerConfig, query: Tensor, value: Tensor) -> bool:
    """Whether values have to be as large as queries and keys.

    On a CPU PyTorch's fused kernel takes one size only, and would leave others to code that keeps
    all scores. Ranks that exchange heads send all three in one tensor.
    """
    if query.shape[3] == value.shape[3]:
        return False
    return query.device.type == "cpu" or config.context_parallel_size > 1


def check_latent_attention(config: Any, local: str | None) -> None:
    """Refuse latent attention that cannot be built, or that would fail in the first step.

    Args:
        config: the model's config, or Megatron's arguments.
        local: why upstream's local attention runs, in words; None: that of ``torch_native`` does.

    Raises:
        FlagError: it names the flag, its value and the remedy.
    """
    if not getattr(config, "multi_latent_attention", False):
        return
    if local is not None:
        raise FlagError(
            "multi_latent_attention",
            True,
            f", and upstream's local attention, which runs because of {local}, takes no heads of "
            "two sizes",
            "use --moe-dynamic-backend torch_native with its own attention",
        )
    if config.qk_pos_emb_head_dim % 2:
        raise FlagError(
            "qk_pos_emb_head_dim",
            config.qk_pos_emb_head_dim,
            "",
            "rotary positions turn pairs, so give an even number",
        )
    if config.qk_layernorm and config.q_lora_rank is None:
        raise FlagError(
            "qk_layernorm",
            True,
            " with --multi-latent-attention and without --q-lora-rank, so there is no latent query "
            "to normalize",
            "give --q-lora-rank, or leave --qk-layernorm out (Transformer Engine normalizes the "
            "keys alone)",
        )
    if getattr(config, "cache_mla_latents", False):
        raise FlagError("cache_mla_latents", True, ", which is for inference", "leave it out")
