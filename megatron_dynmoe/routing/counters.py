"""What a router counts in one global batch, and how the counts become one tensor.

One all-reduce carries everything that the controller and the logs need. Its tensor is float64 and
has the same shape on every rank, ``[num_layers, NUM_STATISTICS + E]``. Integers up to 2**53 stay
exact in it, and a pipeline stage without routers contributes zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class RoutingStatistics(NamedTuple):
    """Sums over tokens or micro-batches, of one router or of all layers.

    The statistics of one router are scalar tensors (``assignments``: [E]); those of all layers have
    a leading dimension L. A sum of statistics over ranks, layers or steps is statistics again.
    """

    tokens: Tensor
    tokens_at_cap: Tensor
    squared_experts: Tensor  # sum over tokens of (experts of the token) ** 2
    balance_loss: Tensor
    dynamic_loss: Tensor
    micro_batches: Tensor  # in units of 1 / size of the group that shares a micro-batch's tokens
    not_finite: Tensor  # tokens with a logit that is NaN or infinite
    thetas: Tensor  # this and the next two are sums over the routers that contribute
    knobs: Tensor  # the numbers that the controller moves; for top-p they are thresholds
    integrals: Tensor
    routers: Tensor
    assignments: Tensor

    @property
    def mean_experts(self) -> Tensor:
        """Experts per token; NaN if no token was counted."""
        return self.assignments.sum(dim=-1) / self.tokens

    def pooled(self) -> RoutingStatistics:
        """Sum over layers (dimension 0)."""
        return RoutingStatistics(*(value.sum(dim=0) for value in self))

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:  # type: ignore[override]
        return RoutingStatistics(*(a + b for a, b in zip(self, other, strict=True)))


NUM_STATISTICS = len(RoutingStatistics._fields) - 1  # each takes one column, except assignments


def pack(
    routers: Iterable[tuple[int, RoutingStatistics]],
    num_layers: int,
    num_experts: int,
    device: torch.device,
) -> Tensor:
    """Put the statistics of this rank's routers into the tensor that is all-reduced.

    Args:
        routers: pairs of a global layer number (1-based) and the statistics of its router.

    Returns:
        [num_layers, NUM_STATISTICS + E] float64; rows without a router are zero.
    """
    packed = torch.zeros(
        num_layers, NUM_STATISTICS + num_experts, dtype=torch.float64, device=device
    )
    for layer_number, statistics in routers:
        *scalars, assignments_E = statistics
        packed[layer_number - 1] += torch.cat(
            [torch.stack([value.double().reshape(()) for value in scalars]), assignments_E.double()]
        )
    return packed


def unpack(packed: Tensor) -> RoutingStatistics:
    """Read statistics, with dimension L first, from a tensor made by :func:`pack`."""
    columns = packed[..., :NUM_STATISTICS].unbind(dim=-1)
    return RoutingStatistics._make([*columns, packed[..., NUM_STATISTICS:]])


class KeepDtype(torch.nn.Module):
    """A module whose own buffers move between devices but are never cast.

    Megatron's Float16Module casts every floating-point buffer. Casting back afterwards is too
    late: by then bf16 has rounded a threshold of 0.2374 to 0.23730469.
    """

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class RoutingCounters(KeepDtype):
    """Accumulates the statistics of one router on its device, without a host sync."""

    tokens: Tensor
    tokens_at_cap: Tensor
    squared_experts: Tensor
    balance_loss: Tensor
    dynamic_loss: Tensor
    micro_batches: Tensor
    not_finite: Tensor
    assignments: Tensor

    def __init__(self, num_experts: int, device: torch.device | int) -> None:
        super().__init__()
        for name in ("tokens", "tokens_at_cap", "squared_experts", "not_finite"):
            zero = torch.zeros((), dtype=torch.int64, device=device)
            self.register_buffer(name, zero, persistent=False)
        for name in ("balance_loss", "dynamic_loss", "micro_batches"):
            zero = torch.zeros((), dtype=torch.float64, device=device)
            self.register_buffer(name, zero, persistent=False)
        zeros_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("assignments", zeros_E, persistent=False)

    @torch.no_grad()
    def add_counts(
        self,
        assignments_E: Tensor,
        experts_T: Tensor,
        max_experts: int | None,
        valid_T: Tensor | None,
        not_finite: Tensor,
    ) -> None:
        """Count one micro-batch. Padding tokens (``valid_T`` is False) are left out.

        Args:
            assignments_E: [E] int64, the number of valid tokens that chose each expert.
            experts_T: [T] int64, the number of experts of each token, including padding.
            not_finite: scalar int64, tokens with a logit that is NaN or infinite, including
                padding.
        """
        if valid_T is not None:
            experts_T = experts_T * valid_T
        self.assignments += assignments_E
        self.not_finite += not_finite
        self.tokens += experts_T.numel() if valid_T is None else valid_T.sum()
        self.squared_experts += experts_T.square().sum()
        if max_experts is not None:
            self.tokens_at_cap += (experts_T == max_experts).sum()

    @torch.no_grad()
    def add_losses(self, balance_loss: Tensor, dynamic_loss: Tensor, group_size: int) -> None:
        """Add this rank's share of one micro-batch's losses; ``group_size`` ranks share them."""
        self.balance_loss += balance_loss
        self.dynamic_loss += dynamic_loss
        self.micro_batches += 1 / group_size

    def read(self, theta: Tensor, knob: Tensor, integral: Tensor) -> RoutingStatistics:
        """Return the statistics so far, with the router's current theta, knob and integral."""
        return RoutingStatistics(
            tokens=self.tokens,
            tokens_at_cap=self.tokens_at_cap,
            squared_experts=self.squared_experts,
            balance_loss=self.balance_loss,
            dynamic_loss=self.dynamic_loss,
            micro_batches=self.micro_batches,
            not_finite=self.not_finite,
            thetas=theta,
            knobs=knob,
            integrals=integral,
            routers=torch.ones_like(self.tokens),
            assignments=self.assignments,
        )

    def clear(self) -> None:
        """Start a new global batch."""
        for buffer in self.buffers():
            buffer.zero_()
