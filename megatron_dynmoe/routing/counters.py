"""What a router counts in one global batch, and how the counts become one tensor.

One all-reduce carries everything that the controller and the logs need. Its tensor is float64 and
has the same shape on every rank, ``[num_layers, NUM_STATISTICS + E]``. Integers up to 2**53 stay
exact in it, and a pipeline stage without routers contributes zeros. Under expert parallelism, a
small one between the ranks of a group finds the busiest of them before.
"""

from __future__ import annotations

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
    overflows = _Column()  # passes with more rows than there was room for
    balance_loss = _Column()
    dynamic_loss = _Column()
    micro_batches = _Column()  # in units of 1 / size of the group that shares its tokens
    not_finite = _Column()  # tokens with a logit that is NaN or infinite
    # Sums over dispatches and ranks; zero without expert parallelism, where no rows travel.
    dispatches = _Column()
    rows = _Column()  # that the rank received
    busiest_rows = _Column()  # that the busiest rank of its expert-parallel group received
    thetas = _Column()  # this and the next two are sums over the routers that contribute
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
    def rank_imbalance(self) -> Tensor:
        """Rows of the busiest expert-parallel rank over the mean of the ranks, from 1 on."""
        return torch.where(self.rows > 0, self.busiest_rows / self.rows, 1.0)

    @property
    def states(self) -> tuple[Tensor, ...]:
        """Mean theta, knob and integral of the routers, [...] float32 each."""
        sums = self.packed[..., _FIRST_OF_STATE : _FIRST_OF_STATE + 3]
        return (sums / self.routers.unsqueeze(-1)).float().unbind(dim=-1)

    def pooled(self, keepdim: bool = False) -> RoutingStatistics:
        """Sum over layers (dimension 0), which ``keepdim`` keeps as a dimension of 1."""
        return RoutingStatistics(self.packed.sum(dim=0, keepdim=keepdim))

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        return RoutingStatistics(self.packed + other.packed)


NUM_STATISTICS = len(RoutingStatistics.columns)
_FIRST_OF_ROWS = RoutingStatistics.columns.index("dispatches")
_FIRST_OF_STATE = RoutingStatistics.columns.index("thetas")


def pack(
    layer_numbers: list[int],
    counters: list[RoutingCounters],
    states_R3: Tensor,
    num_layers: int,
    num_experts: int,
    device: torch.device,
) -> Tensor:
    """Put the statistics of this rank's R routers into the tensor that is all-reduced.

    The number of kernels does not depend on the number of routers.

    Args:
        layer_numbers: the routers' global layer numbers, 1-based.
        counters: what they have counted.
        states_R3: [R, 3] float32: each router's theta, knob and integral.

    Returns:
        [num_layers, NUM_STATISTICS + E] float64; rows without a router are zero.
    """
    if not counters:
        width = NUM_STATISTICS + num_experts
        return torch.zeros(num_layers, width, dtype=torch.float64, device=device)
    rows = torch.stack([each.row for each in counters])
    if (received_R3 := _received_rows(counters)) is not None:
        rows[:, _FIRST_OF_ROWS : _FIRST_OF_ROWS + 3] = received_R3
    rows[:, _FIRST_OF_STATE : _FIRST_OF_STATE + 3] = states_R3
    rows[:, _FIRST_OF_STATE + 3] = 1  # each is one router
    if layer_numbers == list(range(1, num_layers + 1)):
        return rows
    empty, by_layer = rows.new_zeros(rows.shape[1]), dict(zip(layer_numbers, rows, strict=True))
    return torch.stack([by_layer.get(number, empty) for number in range(1, num_layers + 1)])


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
