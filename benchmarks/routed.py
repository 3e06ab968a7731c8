"""Counts of a real training: how many tokens of each sequence chose each expert."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def train(flags: list[str]) -> list[torch.Tensor]:
    """Train in this process, as ``python -m megatron_dynmoe.pretrain FLAGS`` does.

    Args:
        flags: with the ``alltoall`` dispatcher.

    Returns:
        For each step the tokens by layer, sequence and expert, [L, Q, E] int16.
    """
    from megatron_dynmoe.run import prepare

    sys.argv = ["pretrain", *flags]
    prepare()
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from megatron.training import training

    from megatron_dynmoe.moe.dispatch import VariableKAlltoAllTokenDispatcher
    from megatron_dynmoe.training import loop

    steps: list[dict[int, list[torch.Tensor]]] = []
    train_step = training.train_step

    def noting_step(*given: Any, **named: Any) -> Any:
        steps.append({})
        return train_step(*given, **named)

    def noting(dispatch: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: Any, hidden: torch.Tensor, routing_map: torch.Tensor, probs: Any) -> Any:
            if torch.is_grad_enabled():  # no evaluation, and once with recomputation
                tokens_QE = routing_map.view(*hidden.shape[:2], -1).sum(dim=0).short().cpu()
                steps[-1].setdefault(id(self), []).append(tokens_QE)
            return dispatch(self, hidden, routing_map, probs)

        return noted

    training.train_step = noting_step
    for kind in (MoEAlltoAllTokenDispatcher, VariableKAlltoAllTokenDispatcher):  # top-k's, and ours
        kind.dispatch_preprocess = noting(kind.dispatch_preprocess)
    loop.train(time.time())
    return [torch.stack([torch.cat(parts) for parts in step.values()]) for step in steps]
