"""Routers of ranks that hold parts of sequences, against one that holds them whole."""

from __future__ import annotations

import sys

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_dynmoe.moe.rules.seq_top_k import _take_best_of_all
from megatron_dynmoe.routing.rules.seq_top_k import scores_in_order, take_best
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank

POSITIONS, SEQUENCES, NUM_EXPERTS, CAP, MEAN = 48, 3, 4, 3, 1.3


def main() -> None:
    """SeqTopK's choice, split over TP x CP ranks (the command line) as Megatron does."""
    tp, cp = map(int, sys.argv[1:])
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, context_parallel_size=cp
    )
    # Of three values only: most choices are ties, which the positions decide.
    generator = torch.Generator().manual_seed(7)
    print("seed: 7")
    shape = POSITIONS * SEQUENCES, NUM_EXPERTS
    probs_TE = torch.randint(1, 4, shape, generator=generator) / 4
    valid_SB = torch.rand(POSITIONS, SEQUENCES, generator=generator) < 0.8
    scores_TK, _ = scores_in_order(probs_TE, CAP, valid_SB.flatten())
    scores_SBK = scores_TK.view(POSITIONS, SEQUENCES, CAP)

    one = take_best(scores_SBK, MEAN)
    own = _take_best_of_all(
        of_this_rank(scores_SBK, tp, cp),
        MEAN,
        parallel_state.get_tensor_and_context_parallel_group(),
    )
    differing = (own.used_SBK != of_this_rank(one.used_SBK, tp, cp)).sum()
    assert torch.equal(own.left_out_B, one.left_out_B)
    assert torch.equal(own.tokens_B, one.tokens_B)
    print(f"SLOTS {own.used_SBK.numel()} USED {int(own.used_SBK.sum())} DIFFER {int(differing)}")


def losses_with_padding() -> None:
    """The gradient of the routers' losses per token, if two ranks hold unlike numbers of tokens."""
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    rank = parallel_state.get_context_parallel_rank()
    alone = [torch.distributed.new_group([one]) for one in range(2)][rank]
    dynmoe = DynMoEConfig(
        routing="top_p", threshold=0.6, balance_loss_coeff=0.3, dynamic_loss_coeff=0.2
    )
    torch.manual_seed(7)
    part, whole = (one_rank.router(dynmoe, calculate_per_token_loss=True) for _ in range(2))
    whole.load_state_dict(part.state_dict())
    whole.tp_cp_group = alone
    hidden_SBD = torch.randn(8, SEQUENCES, whole.config.hidden_size)
    padding_SB = torch.arange(8).unsqueeze(-1) >= torch.tensor([8, 5, 2])
    whole(hidden_SBD, padding_SB)[0].sum().mul(0).backward()
    part(hidden_SBD.chunk(2)[rank], padding_SB.chunk(2)[rank])[0].sum().mul(0).backward()
    torch.distributed.all_reduce(part.weight.grad)
    assert whole.weight.grad.any()
    torch.testing.assert_close(part.weight.grad, whole.weight.grad)


def of_this_rank(values_SBK: torch.Tensor, tp: int, cp: int) -> torch.Tensor:
    if cp > 1:
        batch = {"values": values_SBK.transpose(0, 1), "cu_seqlens": None}
        group = parallel_state.get_context_parallel_group()
        part = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
        values_SBK = part["values"].transpose(0, 1)
    return values_SBK.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()]
