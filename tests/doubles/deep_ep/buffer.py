"""``deep_ep.Buffer``: a token goes once to every rank that has an expert of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .transfer import exchange
from .utils import EventOverlap

MOST_IDS = 32  # csrc/kernels/legacy/layout.cu and intranode.cu assert num_topk <= 32


class _Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 1

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class _Handle(NamedTuple):
    is_token_in_rank: Tensor  # [T, ranks]
    num_received: list[int]  # tokens, by the rank that sent them


class Buffer:
    """The legacy interface (deep_ep/buffers/legacy.py)."""

    num_sms = 20

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0):
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> _Config:
        return _Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> _Config:
        return _Config()

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, **asynchronous: Any
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        """Count tokens per rank and expert; -1 counts for none (csrc/kernels/legacy/layout.cu)."""
        assert topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == torch.int64
        assert topk_idx.shape[1] <= MOST_IDS and num_experts % self.group.size() == 0
        assert ((topk_idx >= -1) & (topk_idx < num_experts)).all()
        columns = torch.where(topk_idx < 0, num_experts, topk_idx)
        uses_TE = torch.zeros(len(topk_idx), num_experts + 1, dtype=torch.int32)
        uses_TE.scatter_add_(1, columns, torch.ones_like(columns, dtype=torch.int32))
        uses_TE = uses_TE[:, :num_experts]
        is_in_rank = uses_TE.view(len(topk_idx), self.group.size(), -1).sum(dim=-1) > 0
        counts = is_in_rank.sum(dim=0).int(), uses_TE.sum(dim=0).int()
        return counts[0], None, counts[1], is_in_rank, EventOverlap()

    def dispatch(
        self,
        x: Tensor,
        handle: _Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        **asynchronous: Any,
    ) -> tuple[Any, ...]:
        """Send tokens; ids of other ranks' experts become -1 with weight 0 (intranode.cu)."""
        assert x.dim() == 2 and x.is_contiguous()
        assert x.shape[1] * x.element_size() % 16 == 0  # csrc/legacy/buffer.hpp
        num_ranks = self.group.size()
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            in_rank = handle.is_token_in_rank
            rows = exchange([x[in_rank[:, rank]] for rank in range(num_ranks)], self.group)
            return torch.cat(rows), None, None, None, None, EventOverlap()
        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        local = len(num_tokens_per_expert) // num_ranks
        rows, ids, weights = [], [], []
        for rank in range(num_ranks):
            sent = is_token_in_rank[:, rank]
            own = topk_idx[sent] - rank * local
            is_own = (own >= 0) & (own < local)
            rows.append(x[sent])
            ids.append(own.masked_fill(~is_own, -1))
            weights.append(topk_weights[sent].masked_fill(~is_own, 0))
        received = exchange(rows, self.group)
        received_ids = torch.cat(exchange(ids, self.group))
        received_weights = torch.cat(exchange(weights, self.group))
        counts = [int((received_ids == expert).sum()) for expert in range(local)]
        handle = _Handle(is_token_in_rank, [len(part) for part in received])
        event = EventOverlap()
        return torch.cat(received), received_ids, received_weights, counts, handle, event

    def combine(
        self, x: Tensor, handle: _Handle, topk_weights: Tensor | None = None, **asynchronous: Any
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Add up, without weights and in float32, what the ranks return (intranode.cu)."""
        assert x.dim() == 2 and x.is_contiguous()
        assert x.dtype == torch.bfloat16  # SWITCH_TYPES of csrc/kernels/legacy/launch.cuh
        result = self._add_up(x, handle).to(x.dtype)
        if topk_weights is None:
            return result, None, EventOverlap()
        assert topk_weights.dtype == torch.float32
        return result, self._add_up(topk_weights, handle), EventOverlap()

    def _add_up(self, rows: Tensor, handle: _Handle) -> Tensor:
        returned = exchange(rows.split(handle.num_received), self.group)
        sums = torch.zeros(len(handle.is_token_in_rank), *rows.shape[1:])
        for rank, part in enumerate(returned):
            sums[handle.is_token_in_rank[:, rank]] += part.float()
        return sums
