"""``pytorch/attention/__init__.py`` and ``dot_product_attention/``."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...not_stood_for import NotStoodFor, refuse
from ..module.base import TransformerEngineBaseModule, group_size
from .context_parallel import Gathered, check_split, positions

# ``csrc/extensions/softmax.cpp`` and attention_mask_func in utils.py: what a masked score becomes.
MASKED_SCORE = -10000.0


class DotProductAttention(TransformerEngineBaseModule):
    """``DotProductAttention`` for queries [S, B, N, H], keys and values [S, B, G, H].

    Which of the original's implementations runs depends on the type
    (``utils.py``, get_attention_backend). Those for 16 bits (flash attention and cuDNN) read a mask
    only if the mask type is padding or arbitrary. So **with a causal mask type they ignore it**.
    The unfused one, which alone runs float32, merges it with the causal mask (get_full_mask).
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        **unused: Any,
    ) -> None:
        super().__init__()
        refuse(softmax_type=softmax_type != "vanilla", **unused)  # windows ...
        assert attention_type in ("self", "cross"), f"attention_type {attention_type} not supported"
        self.set_up_tensor_parallel(tp_group, tp_size, sequence_parallel)
        groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        assert num_attention_heads % groups == 0, (
            "The number of attention heads must be divisible by the number of GQA groups!"
        )
        self.num_gqa_groups_per_partition = groups // self.tp_size
        self.head_dims = (kv_channels,) * 2 if isinstance(kv_channels, int) else kv_channels
        self.attn_mask_type, self.qkv_format = attn_mask_type, qkv_format
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(self.head_dims[0])
        self.layer_number = layer_number
        self.attention_dropout = torch.nn.Dropout(attention_dropout)
        # Ranks that each have a part of the sequence draw from the default generator.
        self.dropout_context: Callable[[], Any] = contextlib.nullcontext
        if not sequence_parallel and get_rng_state_tracker is not None:
            self.dropout_context = get_rng_state_tracker().fork
        # backends.py: NVTE_APPLY_QK_LAYER_SCALING has an effect in float16 only.
        scaling = int(os.getenv("NVTE_APPLY_QK_LAYER_SCALING", "0"))
        self.apply_qk_layer_scaling = bool(scaling) and layer_number is not None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        attn_mask_type: str | None = None,
        **unused: Any,
    ) -> Tensor:
        """Attend; [S, B, N * H].

        Args:
            attention_mask: True for masked, broadcast to [B, N, S, S].
        """
        refuse(**unused)
        self.prepare_forward(query)
        if (qkv_format or self.qkv_format) != "sbhd":
            raise NotStoodFor(f"qkv_format {qkv_format}")
        kind = attn_mask_type or self.attn_mask_type
        if kind not in ("causal", "no_mask"):
            raise NotStoodFor(f"attention with mask type {kind}")
        assert query.dtype == key.dtype == value.dtype, (
            "Queries, keys and values must have the same data type!"
        )
        assert key.shape[:-1] == value.shape[:-1], (
            "Keys and values must have the same batch size, sequence length and number of heads!"
        )
        assert (query.shape[-1], value.shape[-1]) == tuple(self.head_dims), "another head_dim!"
        assert key.shape[2] == self.num_gqa_groups_per_partition, (
            f"Keys and values must have num_gqa_group = {self.num_gqa_groups_per_partition} heads!"
        )
        later = _later(query)
        if self.cp_group is not None and group_size(self.cp_group) > 1:
            check_split(query, key, self.cp_comm_type, group_size(self.cp_group))
            refuse(attention_dropout=self.training and self.attention_dropout.p)
            if attention_mask is not None:
                raise NotStoodFor("a mask beside context parallelism")
            key, value = (Gathered.apply(part, self.cp_group) for part in (key, value))
            order = positions(len(query), self.cp_group, query.device)
            later = order[self.cp_group.rank()][:, None] < order.flatten()
        repeats = query.shape[2] // key.shape[2]
        key, value = (part.repeat_interleave(repeats, dim=2) for part in (key, value))
        # [B * N, S, H]
        q, k, v = (part.flatten(1, 2).transpose(0, 1) for part in (query, key, value))
        scores = torch.baddbmm(
            q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0.0, alpha=self.softmax_scale
        )
        batch, heads = query.shape[1:3]
        scores = scores.unflatten(0, (batch, heads))
        read = attention_mask if query.dtype == torch.float32 else None
        masks = [mask for mask in (read, later if kind == "causal" else None) if mask is not None]
        for mask in masks:  # get_full_mask
            scores = scores.masked_fill(mask, MASKED_SCORE)
        probs = scores.float().softmax(dim=-1).to(query.dtype)
        with self.dropout_context():
            probs = self.attention_dropout(probs)
        context = torch.bmm(probs.flatten(0, 1), v).unflatten(0, (batch, heads))
        return context.permute(2, 0, 1, 3).flatten(2)


def _later(query: Tensor) -> Tensor:
    """Which keys come after a query, [S, S] bool, aligned to the top left corner."""
    length = len(query)
    return torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)


__all__ = ["DotProductAttention"]
