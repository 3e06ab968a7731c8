"""``deep_ep.HybridEPBuffer``: a row per token and expert, in the order of the local experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .transfer import exchange


class HybridEPBuffer:
    """The calls with permutation (deep_ep/hybrid_ep_buffer.py, csrc/hybrid_ep/hybrid_ep.cu)."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        **tuning: Any,
    ) -> None:
        assert not use_fp8
        self.group, self.hidden_dim, self.num_local_experts = group, hidden_dim, num_local_experts

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        scaling_factor: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        num_permuted_tokens: int | Tensor | None = None,
        pad_multiple: int | None = None,
        handle: tuple[Any, ...] | None = None,
        non_blocking: bool = False,
    ) -> tuple[Any, ...]:
        """Send rows. They lie by expert, within an expert by rank and token."""
        assert hidden.is_contiguous() and hidden.shape[1] == self.hidden_dim
        assert pad_multiple is None and not non_blocking and scaling_factor is None
        if handle is None:
            assert routing_map is not None and routing_map.dtype == torch.bool
            assert routing_map.is_contiguous() and len(routing_map) == len(hidden)
            assert routing_map.shape[1] == self.group.size() * self.num_local_experts
            assert num_of_experts_per_rank == self.num_local_experts
            counts = [len(hidden)] * self.group.size()
            gathered = [torch.empty_like(routing_map) for _ in counts]
            sizes = torch.tensor([len(hidden)])
            dist.all_reduce(sizes, dist.ReduceOp.MAX, group=self.group)
            assert int(sizes) == len(hidden), "all ranks have to bring equally many tokens"
            dist.all_gather(gathered, routing_map, group=self.group)
            handle = (routing_map, self._received(gathered))
        sent_map, order = handle
        rows = self._send(hidden, sent_map, order)
        weights = None
        if probs is not None:
            assert probs.dtype == torch.float32 and probs.is_contiguous()
            weights = self._send(probs.unsqueeze(-1), sent_map, order, by_expert=True).squeeze(-1)
        counts = torch.bincount(order[1], minlength=self.num_local_experts)
        assert num_permuted_tokens is None or int(num_permuted_tokens) == len(rows)
        return rows, weights, None, counts.int(), handle

    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        probs: Tensor | None = None,
        handle: tuple[Any, ...],
        pad_multiple: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Add up each token's rows in float32, without weights."""
        # The kernels take 2-byte types only (csrc/hybrid_ep/hybrid_ep.cu).
        assert hidden.element_size() == 2 and hidden.is_contiguous()
        sent_map, order = handle
        tokens, experts = self._sent(sent_map)
        sums = torch.zeros(len(sent_map), self.hidden_dim)
        sums.index_add_(0, tokens, self._return(hidden, order).float())
        if probs is None:
            return sums.to(hidden.dtype), None
        assert probs.dtype == torch.float32 and probs.is_contiguous()
        weights = torch.zeros(sent_map.shape)
        weights[tokens, experts] = self._return(probs, order)
        return sums.to(hidden.dtype), weights

    def _received(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
        """Where the rows of this rank come to lie, the expert of each, and rows by sender."""
        first = self.group.rank() * self.num_local_experts
        local = [part[:, first : first + self.num_local_experts] for part in maps]
        experts = torch.cat([part.t().nonzero()[:, 0] for part in local])
        order = experts.argsort(stable=True)
        return order, experts[order], [int(part.sum()) for part in local]

    def _sent(self, sent_map: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and experts of the rows that leave this rank, in the order in which they do."""
        experts, tokens = sent_map.t().nonzero().unbind(dim=1)
        return tokens, experts

    def _send(
        self, values: Tensor, sent_map: Tensor, order: Any, by_expert: bool = False
    ) -> Tensor:
        tokens, experts = self._sent(sent_map)
        rows = values[tokens, experts] if by_expert else values[tokens]
        per_rank = sent_map.view(len(sent_map), self.group.size(), -1).sum(dim=(0, 2)).tolist()
        return torch.cat(exchange(rows.split(per_rank), self.group))[order[0]]

    def _return(self, rows: Tensor, order: Any) -> Tensor:
        unsorted = torch.empty_like(rows)
        unsorted[order[0]] = rows
        return torch.cat(exchange(unsorted.split(order[2]), self.group))
