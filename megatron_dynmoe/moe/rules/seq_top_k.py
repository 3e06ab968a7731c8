"""SeqTopK: the tokens of a sequence share a budget, which goes to their best scores.

In training the budget is ``target_experts_per_token`` times the tokens of the sequence, so the
count needs no controller. Such a choice depends on later tokens. In evaluation and inference a
token therefore uses the experts whose probability exceeds a threshold: the mean, over the sequences
of the last global batch, of the best probability that the budget left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dynmoe.moe.rules.rule import Rule
from megatron_dynmoe.routing.route import Routing, route_by
from megatron_dynmoe.routing.rules.seq_top_k import (
    Taken,
    as_map,
    scores_in_order,
    select_above,
    take_best,
)
from megatron_dynmoe.settings.config import DynMoEConfig


class SeqTopK(Rule):
    """See :mod:`megatron_dynmoe.routing.rules.seq_top_k`.

    State: ``score_threshold``, [1]. Means over several batches follow the probabilities too slowly.
    """

    knob = "score_threshold"
    entries = ("score_threshold",)
    direction = -1
    by_sequence = True
    num_sums = 2  # the best probabilities left out, and the sequences

    def __init__(self, dynmoe: DynMoEConfig, first: float | None, num_experts: int) -> None:
        super().__init__(dynmoe, first, num_experts)
        self.first_state = {"score_threshold": (1 / num_experts,)}  # for evaluations before a step
        self.fixed = {}
        target = dynmoe.target_experts_per_token
        assert target is not None
        self.mean = target.at(0)

    def route(
        self,
        logits_TE: Tensor,
        state: Mapping[str, Tensor],
        *,
        num_sequences: int,
        valid_T: Tensor | None,
        training: bool,
        group: ProcessGroup | None,
        **batch: Any,
    ) -> Routing:
        sums: list[Tensor] = []
        cap = self.cap(training)

        def best(probs_TE: Tensor) -> Tensor:
            scores_TK, ids_TK = scores_in_order(probs_TE, cap, valid_T)
            scores_SBK = scores_TK.view(-1, num_sequences, scores_TK.shape[-1])
            taken = _take_best_of_all(scores_SBK, self.mean, group)
            sums.append(_summed(taken))
            return as_map(ids_TK, taken.used_SBK.reshape(ids_TK.shape), self.num_experts)

        def above(probs_TE: Tensor) -> Tensor:
            return select_above(probs_TE, state["score_threshold"], cap)

        routed = route_by(
            best if training else above,
            logits_TE,
            renormalize=self.dynmoe.weights == "renormalized",
            num_sequences=num_sequences,
            valid_T=valid_T,
            **batch,
        )
        return routed._replace(sums_W=sums[0]) if sums else routed

    def next_state(
        self, state: Mapping[str, Tensor], sums_RW: Tensor, next_knob_R1: Tensor | None
    ) -> Mapping[str, Tensor]:
        left_out_R1, sequences_R1 = sums_RW.split(1, dim=-1)
        found_R1 = (left_out_R1 / sequences_R1).float()
        threshold_R1 = torch.where(sequences_R1 > 0, found_R1, state["score_threshold"])
        return {"score_threshold": threshold_R1}


def _summed(taken: Taken) -> Tensor:
    """The sums over sequences that have tokens, [2] float64."""
    has_tokens_B = taken.tokens_B > 0
    return torch.stack([(taken.left_out_B.double() * has_tokens_B).sum(), has_tokens_B.sum()])


def _take_best_of_all(scores_SBK: Tensor, mean: float, group: ProcessGroup | None) -> Taken:
    """Take the best of sequences whose positions lie on all ranks of the group.

    Every rank gets the scores of all, in the order of positions, and takes what one rank would
    take. So ties, too, are decided as on one rank.

    Args:
        scores_SBK: [S, B, K], this rank's, as for :func:`take_best`.
        mean: as for :func:`take_best`.
        group: the ranks, or None for this one alone.

    Returns:
        As :func:`take_best`, with ``used_SBK`` of this rank.
    """
    if group is None:
        return take_best(scores_SBK, mean)
    # Settings and their checks import the rules, but not Megatron.
    from megatron.core.parallel_state import get_context_parallel_world_size

    cp = get_context_parallel_world_size()
    cp_rank, tp_rank = divmod(group.rank(), group.size() // cp)
    all_SBK = scores_SBK.new_empty(group.size() * len(scores_SBK), *scores_SBK.shape[1:])
    torch.distributed.all_gather_into_tensor(all_SBK, scores_SBK.contiguous(), group=group)
    if cp == 1:  # the ranks have one stretch of positions after the other
        taken = take_best(all_SBK, mean)
        return taken._replace(used_SBK=taken.used_SBK.chunk(group.size())[tp_rank])
    # Megatron cuts a sequence into 2 CP chunks, gives each context-parallel rank r chunk r and
    # chunk 2 CP - 1 - r, and splits these over the ranks with sequence parallelism.
    halves = all_SBK.view(cp, 2, -1, *scores_SBK.shape[1:])
    chunks = torch.cat([halves[:, 0], halves[:, 1].flip(0)])
    taken = take_best(chunks.flatten(0, 1), mean)
    used = taken.used_SBK.reshape(chunks.shape)
    own = torch.cat([used[cp_rank], used[2 * cp - 1 - cp_rank]])
    return taken._replace(used_SBK=own.chunk(group.size() // cp)[tp_rank])
