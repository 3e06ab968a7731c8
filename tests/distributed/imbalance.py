"""Uneven loads of experts and ranks, with a varying number of experts per token.

The eight workloads are those of the token-imbalance benchmark that was proposed for Megatron (pull
request 7488 of NVIDIA/Megatron-LM), where every token uses the same number of experts. Each varies
one thing: which experts are hot, on which ranks they lie, who sends, and what changes from step to
step.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS, HEAT, STEPS = 48, 24.0, 3


def workloads(rank: int, world_size: int, num_experts: int) -> dict[str, Tensor]:
    """This rank's maps [T, E] bool, by name. A token uses 1 to 4 experts unless it is said."""
    per_rank = num_experts // world_size
    generator = torch.Generator().manual_seed(1000 + rank)
    even_E = torch.ones(num_experts)
    by_rank_RE = even_E.view(world_size, per_rank)  # a rank's experts

    def hot(*experts: int) -> Tensor:
        weights_E = even_E.clone()
        weights_E[list(experts)] = HEAT
        return weights_E

    def draw(weights_E: Tensor, most: int = 4) -> Tensor:
        counts_T = torch.randint(1, most + 1, (TOKENS,), generator=generator)
        return _draw(weights_E, counts_T, generator)

    spread = torch.zeros_like(by_rank_RE)
    spread[:, 0] = HEAT
    unused_E = even_E.clone()
    unused_E[-per_rank:] = 0
    unused_E[0] = 0
    maps = {
        "W0 balanced": _round_robin(num_experts),
        "W1 hot experts": draw(hot(1, num_experts // 2, num_experts - 1)),
        "W2 hot rank": draw(hot(*range(per_rank))),
        "W3 spread heat": draw(even_E + spread.flatten()),
        "W4 ragged sources": draw(even_E, most=num_experts if rank == 0 else 1),
        # On one rank all experts would be without a token.
        "W5 ranks without tokens": draw(unused_E if world_size > 1 else hot(2), most=2),
    }
    for step in range(STEPS):
        maps[f"W6 rotating hot spot, step {step}"] = draw(hot(step * 3 % num_experts))
        bursting = torch.zeros(TOKENS, num_experts, dtype=torch.bool)
        bursting[:, -1] = True
        burst = bursting if step == 1 else _round_robin(num_experts)
        maps[f"W7 burst, step {step}"] = burst
    return maps


def _draw(weights_E: Tensor, counts_T: Tensor, generator: torch.Generator) -> Tensor:
    """Choose this many distinct experts for each token, those of large weight more often."""
    # The largest of log(weight) plus Gumbel noise are a draw without replacement.
    noise_TE = torch.rand(len(counts_T), len(weights_E), generator=generator)
    scores_TE = weights_E.log() - (-noise_TE.log()).log()
    ranks_TE = scores_TE.argsort(dim=1, descending=True).argsort(dim=1)
    return (ranks_TE < counts_T.unsqueeze(1)) & (weights_E > 0)


def _round_robin(num_experts: int) -> Tensor:
    """Tokens of 1, 2, 3 and 4 experts, so that every expert has equally many tokens."""
    map_TE = torch.zeros(TOKENS, num_experts, dtype=torch.bool)
    following = 0
    for token in range(TOKENS):
        for _ in range(1 + token % 4):
            map_TE[token, following % num_experts] = True
            following += 1
    return map_TE
