"""The counts of rows that the host would read from the device, made up for a balanced load.

Every token goes to as many experts as asked for, and every rank sends as many rows to each other.
With an imbalance, the experts of this GPU get that many times their share from every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_dynmoe.dry_run.devices import known


@dataclass(frozen=True)
class BalancedRows:
    """How many rows go where.

    Attributes:
        experts_per_token: the mean.
        imbalance: how many times its share this GPU gets.
    """

    experts_per_token: float
    imbalance: float

    def telling(self, preprocess: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a dispatcher's ``preprocess``, so that it reads these counts."""

        def run(dispatcher: Any, routing_map: Any) -> Any:
            per_expert = preprocess(dispatcher, routing_map)
            self._tell(dispatcher, len(routing_map), per_expert)
            return per_expert

        return run

    def means(self, read: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function by which a row buffer reads the means: no layer overflows."""

        def run(statistics: Any) -> tuple[list[float], list[float]]:
            num_layers = len(read(statistics)[0])
            return [0.0] * num_layers, [self.experts_per_token] * num_layers

        return run

    def _tell(self, dispatcher: Any, num_tokens: int, per_expert: Any) -> None:
        ranks, slices = dispatcher.ep_size, dispatcher.tp_size
        local = dispatcher.num_local_experts
        sent = round(num_tokens * self.experts_per_token)
        here = round(sent / ranks * self.imbalance) if ranks > 1 else sent
        to_ranks = np.empty(ranks, dtype=np.int64)
        to_ranks[dispatcher.ep_group.rank()] = here
        others = np.arange(ranks) != dispatcher.ep_group.rank()
        to_ranks[others] = known.split(sent - here, ranks - 1)
        from_ranks = np.full(ranks, here)
        by_expert = np.stack([known.split(here, local)] * (slices * ranks))
        known.know(dispatcher.num_out_tokens, sent)
        known.know(dispatcher.input_splits, to_ranks)
        known.know(dispatcher.output_splits, from_ranks)
        known.know(dispatcher.output_splits_tp, np.full(slices, from_ranks.sum()))
        known.know(getattr(dispatcher, "num_global_tokens_per_local_expert", None), by_expert)
        known.know(per_expert, by_expert.sum(axis=0))
