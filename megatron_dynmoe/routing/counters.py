"""What a router counts in one global batch, and how the counts become one tensor.

One all-reduce carries everything that the controller and the logs need. Its tensor is float64 and
has the same shape on every rank, ``[num_layers, NUM_STATISTICS + E]``. Integers up to 2**53 stay
exact in it, and a pipeline stage without routers contributes zeros. Under expert parallelism, a
small one between the ranks of a group finds the busiest of them before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_dynmoe.routing.keep_dtype import KeepDtype


class _Column:
    """One column of the packed tensor, as a view of it."""

    def __set_name__(self, owner: type[RoutingStatistics], name: str) -> None:
        self.index = len(owner.columns)
        owner.columns.append(name)

    def __get__(self, statistics: RoutingStatistics, owner: type[RoutingStatistics]) -> Tensor:
        return statistics.packed[..., self.index]


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """Sums over tokens or micro-batches, of one router or of all layers.

    The columns are views. Those of one router are scalar tensors (``assignments``: [E]); those of
    all layers have a leading dimension L. A sum of statistics over ranks, layers or steps is
    statistics again.

    Attributes:
        packed: [..., NUM_STATISTICS + E] float64, the columns in this order, then ``assignments``.
    """

    packed: Tensor

    columns: ClassVar[list[str]] = []
    tokens = _Column()
    tokens_at_cap = _Column()
    squared_experts = _Column()  # sum over tokens of (experts of the token) ** 2
    balance_loss = _Column()
    dynamic_loss = _Column()
    micro_batches = _Column()  # in units of 1 / size of the group that shares its tokens
    not_finite = _Column()  # tokens with a logit that is NaN or infinite
    overflows = _Column()  # passes with more rows than there was room for
    # Sums over dispatches and ranks; zero without expert parallelism, where no rows travel.
    dispatches = _Column()
    rows = _Column()  # that the rank received
    busiest_rows = _Column()  # that the busiest rank of its expert-parallel group received
    theta_offsets = _Column()  # this and the next two are sums over the routers that contribute
    knobs = _Column()  # the numbers that the controller moves; for top-p they are thresholds
    integrals = _Column()
    routers = _Column()

    @property
    def assignments(self) -> Tensor:
        """Tokens that chose each expert, [..., E]."""
        return self.packed[..., len(self.columns) :]

    @property
    def mean_experts(self) -> Tensor:
        """Experts per token; NaN if no token was counted."""
        return self.assignments.sum(dim=-1) / self.tokens

    @property
    def is_invalid(self) -> Tensor:
        """Whether the counts mean nothing: a logit was not finite, or rows were left out."""
        return self.packed[..., _FIRST_OF_FAULTS : _FIRST_OF_FAULTS + 2].any(dim=-1)

    @property
    def rank_imbalance(self) -> Tensor:
        """Rows of the busiest expert-parallel rank over the mean of the ranks, from 1 on."""
        return torch.where(self.rows > 0, self.busiest_rows / self.rows, 1.0)

    @property
    def thetas(self) -> Tensor:
        """Mean theta of the routers, [...] float32."""
        return (1 + self.theta_offsets / self.routers).float()

    @property
    def controlled(self) -> tuple[Tensor, ...]:
        """Mean knob and integral of the routers, [...] float32 each."""
        sums = self.packed[..., _FIRST_OF_STATE + 1 : _FIRST_OF_STATE + 3]
        return (sums / self.routers.unsqueeze(-1)).float().unbind(dim=-1)

    def pooled(self, keepdim: bool = False) -> RoutingStatistics:
        """Sum over layers (dimension 0), which ``keepdim`` keeps as a dimension of 1."""
        return RoutingStatistics(self.packed.sum(dim=0, keepdim=keepdim))

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        return RoutingStatistics(self.packed + other.packed)


NUM_STATISTICS = len(RoutingStatistics.columns)
_FIRST_OF_ROWS = RoutingStatistics.columns.index("dispatches")
_FIRST_OF_STATE = RoutingStatistics.columns.index("theta_offsets")
_FIRST_OF_FAULTS = RoutingStatistics.columns.index("not_finite")


def pack(
    routers: Mapping[int, tuple[RoutingCounters, Sequence[Tensor]]],
    num_layers: int,
    num_experts: int,
    device: torch.device,
) -> Tensor:
    """Put the statistics of this rank's routers into the tensor that is all-reduced.

    The number of kernels does not depend on the number of routers.

    Args:
        routers: by global layer number, from 1: what a router has counted, and its theta offset,
            knob and integral, [1] float32 each.

    Returns:
        [num_layers, NUM_STATISTICS + E] float64; rows without a router are zero.
    """
    layers = [routers.get(number) for number in range(1, num_layers + 1)]
    row, zero, one = (
        _constant(value, size, dtype, device)
        for value, size, dtype in (
            (0.0, NUM_STATISTICS + num_experts, torch.float64),
            (0.0, 1, torch.float32),
            (1.0, 1, torch.float32),
        )
    )
    packed = torch.stack([row if layer is None else layer[0].row for layer in layers])
    if (received := _received_rows([counters for counters, _ in routers.values()])) is not None:
        rows = dict(zip(routers, received, strict=True))
        none = torch.zeros_like(received[0])
        packed[:, _FIRST_OF_ROWS : _FIRST_OF_ROWS + 3] = torch.stack(
            [rows.get(number, none) for number in range(1, num_layers + 1)]
        )
    states = [(zero,) * 4 if layer is None else (*layer[1], one) for layer in layers]
    states_4L = torch.cat([state for column in zip(*states, strict=True) for state in column])
    packed[:, _FIRST_OF_STATE : _FIRST_OF_STATE + 4] = states_4L.view(4, -1).t()
    return packed


@functools.cache
def _constant(value: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that nobody writes to. To fill one takes a kernel in every step."""
    return torch.full((size,), value, dtype=dtype, device=device)


class RoutingCounters(KeepDtype):
    """Accumulates the statistics of one router on its device, without a host sync.

    Attributes:
        row: [NUM_STATISTICS + E] float64, laid out as :class:`RoutingStatistics`. Whole numbers up
            to 2**53 stay exact.
        sums_W: [W] float64, the sums of the router's rule, which may have none.
        ep_group: the expert-parallel ranks between which rows travel; None if there is one rank.
        received: for each dispatch of this global batch, the rows of each local expert,
            [number of local experts] int64.
    """

    row: Tensor
    sums_W: Tensor
    ep_group: torch.distributed.ProcessGroup | None = None
    received: list[Tensor]

    def __init__(self, num_experts: int, device: torch.device | int, num_sums: int = 0) -> None:
        super().__init__()
        for name, width in (("row", NUM_STATISTICS + num_experts), ("sums_W", num_sums)):
            zeros = torch.zeros(width, dtype=torch.float64, device=device)
            self.register_buffer(name, zeros, persistent=False)
        self.received = []

    @property
    def sums(self) -> RoutingStatistics:
        """The statistics so far, as views; those of the router's state are zero."""
        return RoutingStatistics(self.row)

    @torch.no_grad()
    def add_counts(
        self,
        assignments_E: Tensor,
        experts_T: Tensor,
        max_experts: int | None,
        valid_T: Tensor | None,
        not_finite: Tensor,
        sums_W: Tensor | None = None,
    ) -> None:
        """Count one micro-batch. Padding tokens (``valid_T`` is False) are left out.

        Args:
            assignments_E: [E] int64, the number of valid tokens that chose each expert.
            experts_T: [T] int64, the number of experts of each token, including padding.
            not_finite: scalar int64, tokens with a logit that is NaN or infinite, including
                padding.
            sums_W: [W], what the rule has summed.
        """
        if sums_W is not None:
            self.sums_W.add_(sums_W)
        sums = self.sums
        if valid_T is not None:
            experts_T = experts_T * valid_T
        sums.assignments.add_(assignments_E)
        sums.not_finite.add_(not_finite)
        sums.tokens.add_(experts_T.numel() if valid_T is None else valid_T.sum())
        sums.squared_experts.add_(experts_T.square().sum())
        if max_experts is not None:
            sums.tokens_at_cap.add_((experts_T == max_experts).sum())

    @torch.no_grad()
    def add_losses(self, balance_loss: Tensor, dynamic_loss: Tensor, group_size: int) -> None:
        """Add this rank's share of one micro-batch's losses; ``group_size`` ranks share them."""
        sums = self.sums
        sums.balance_loss.add_(balance_loss)
        sums.dynamic_loss.add_(dynamic_loss)
        sums.micro_batches.add_(1 / group_size)


def _received_rows(counters: list[RoutingCounters]) -> Tensor | None:
    """Count the rows that this rank received, and those of the busiest rank of its group.

    A layer waits for the busiest rank of each dispatch, so the maximum is taken for each dispatch
    and then summed. All layers of a rank dispatch equally often, so one collective suffices.

    Returns:
        [R, 3] int64: dispatches, rows, rows of the busiest rank. None without expert parallelism.
    """
    received = [rows for each in counters for rows in each.received]
    if not received:
        return None
    rows_RM = torch.stack(received).sum(dim=1).view(len(counters), -1)
    busiest_RM = rows_RM.clone()
    torch.distributed.all_reduce(
        busiest_RM, op=torch.distributed.ReduceOp.MAX, group=counters[0].ep_group
    )
    each_RM = torch.stack([torch.ones_like(rows_RM), rows_RM, busiest_RM])
    return each_RM.sum(dim=-1).T


def clear(counters: list[RoutingCounters]) -> None:
    """Start a new global batch."""
    with_sums = [each.sums_W for each in counters if len(each.sums_W)]
    torch._foreach_zero_([each.row for each in counters] + with_sums)
    for each in counters:
        each.received.clear()
