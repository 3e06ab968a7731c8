"""SeqTopK's selection against the loops, and against what it has to be in simple cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dynmoe.routing.rules.seq_top_k import as_map, scores_in_order, select_above, take_best
from megatron_dynmoe.routing.select import choose_top_k
from tests.oracles import routing as oracle

S, B, E = 12, 3, 6


def selected(probs_SBE: Tensor, mean: float, cap: int | None, valid_SB: Tensor | None = None):
    """The routing map [S, B, E], and what was taken."""
    num_experts = probs_SBE.shape[-1]
    valid_T = None if valid_SB is None else valid_SB.flatten()
    scores_TK, ids_TK = scores_in_order(probs_SBE.reshape(-1, num_experts), cap, valid_T)
    taken = take_best(scores_TK.view(*probs_SBE.shape[:2], -1), mean)
    map_TE = as_map(ids_TK, taken.used_SBK.reshape(ids_TK.shape), num_experts)
    return map_TE.view(probs_SBE.shape), taken


def random_probs(ties: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    logits_SBE = torch.randn(S, B, E, generator=generator, dtype=torch.float64)
    if ties:  # few values: most choices are decided by position and index
        logits_SBE = logits_SBE.round()
        logits_SBE[::2] = logits_SBE[:1]
    return logits_SBE.softmax(dim=-1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("mean", "cap"), [(2, None), (2, 3), (1.3, 4), (0.5, 1), (2, 2), (E, E)])
def test_it_takes_what_the_loops_take(mean, cap, padded, ties, dtype):
    probs_SBE = random_probs(ties, dtype)
    valid_SB = torch.ones(S, B, dtype=torch.bool)
    if padded:
        valid_SB[9:, 0] = False
        valid_SB[3, 1] = False
        valid_SB[:, 2] = False  # a sequence of padding only
    map_SBE, taken = selected(probs_SBE, mean, cap, valid_SB if padded else None)
    for b in range(B):
        choices, left_out = oracle.seq_top_k(
            probs_SBE[:, b].tolist(), mean, cap, valid_SB[:, b].tolist()
        )
        assert [set(row.nonzero().flatten().tolist()) for row in map_SBE[:, b]] == choices
        assert taken.left_out_B[b].item() == left_out
        assert taken.tokens_B[b] == valid_SB[:, b].sum()


def test_the_best_score_left_out_is_the_threshold_that_chooses_the_same():
    probs_SBE = random_probs(ties=False)
    map_SBE, taken = selected(probs_SBE, 1.5, 3)
    for b in range(B):
        map_TE = select_above(probs_SBE[:, b], taken.left_out_B[b], 3)
        assert torch.equal(map_TE, map_SBE[:, b])
        assert map_TE.sum(dim=-1).unique().numel() > 1, "the count has to vary"


def test_a_cap_of_the_mean_is_top_k():
    probs_SBE = random_probs(ties=True)
    map_SBE, _ = selected(probs_SBE, 2, 2)
    ids_TK, used_TK = choose_top_k(probs_SBE.view(-1, E), 2)
    assert torch.equal(map_SBE.view(-1, E), as_map(ids_TK, used_TK, E))


@pytest.mark.parametrize(
    ("mean", "tokens", "total"), [(1.1, 10, 11), (1.4, 90, 126), (0.5, 5, 2), (0.05, 8, 0)]
)
def test_the_total_is_rounded_down(mean, tokens, total):
    map_SBE, taken = selected(torch.rand(tokens, 1, E), mean, None)
    assert map_SBE.sum() == total
    assert taken.left_out_B > 0


def test_one_sequence_does_not_compete_with_another():
    probs_SBE = random_probs(ties=False)
    alone, _ = selected(probs_SBE[:, :1], 2, 4)
    probs_SBE[:, 1:] = torch.eye(E)[0]  # all scores of these beat those of the first
    beside, _ = selected(probs_SBE, 2, 4)
    assert torch.equal(alone[:, 0], beside[:, 0])


def test_a_token_with_nan_gets_the_first_expert():
    probs_SBE = random_probs(ties=False)
    probs_SBE[7, 0] = torch.nan
    map_SBE, taken = selected(probs_SBE, 2, None)
    assert map_SBE[7, 0].nonzero().flatten().tolist() == [0]
    assert map_SBE.sum(dim=(0, 2)).tolist() == [2 * S] * B
    assert taken.left_out_B.isfinite().all()
    assert select_above(probs_SBE[:, 0], 0.2)[7].tolist() == [True] + [False] * (E - 1)


def test_the_threshold_gives_none_to_some_and_keeps_to_the_cap():
    probs_TE = torch.tensor([[0.4, 0.35, 0.25], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]])
    assert select_above(probs_TE, 0.3).tolist() == [
        [True, True, False],
        [False, False, True],
        [True, True, True],
    ]
    assert select_above(probs_TE, 0.3, 1).long().argmax(dim=-1).tolist() == [0, 2, 0]
    assert select_above(probs_TE, 0.3, 1).sum(dim=-1).tolist() == [1, 1, 1]
    assert select_above(probs_TE, 0.35).sum(dim=-1).tolist() == [1, 1, 0]  # strictly above
