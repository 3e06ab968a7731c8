"""Context parallelism without Transformer Engine: ranks exchange heads (Ulysses).

Under context parallelism a rank holds a part of every sequence. Attention needs whole sequences,
but no head needs another one. So the ranks of a group exchange parts before attention, and each
attends over the whole sequence with its share of the heads; a second exchange brings the results
back (DeepSpeed-Ulysses, Jacobs et al. 2023; ``--cp-comm-type a2a`` in Megatron). The numbers of an
output are those of one rank, because no sum is split.

With C ranks Megatron cuts a sequence into 2C chunks and gives chunks r and 2C - 1 - r to rank r, so
that causal attention would be even work for ranks that attend to their own queries only. The
exchange puts the chunks into the order of the sequence and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core.tensor_parallel import all_to_all
from torch import Tensor

from megatron_dynmoe.settings.messages.refusals import FlagError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.distributed import ProcessGroup

EXCHANGE = "a2a"  # of --cp-comm-type


def check_context_parallel(transformer: TransformerConfig) -> None:
    """Refuse a split of sequences that this exchange cannot do.

    Args:
        transformer: the model's config, with ``context_parallel_size`` above 1.

    Raises:
        FlagError: ``--cp-comm-type`` asks for another exchange, or there are too few heads.
    """
    kinds = kinds_of_exchange(transformer)
    if any(kind != EXCHANGE for kind in kinds):
        raise FlagError(
            "cp_comm_type",
            kinds,
            ", and without Transformer Engine ranks of --context-parallel-size "
            f"{transformer.context_parallel_size} exchange heads",
            f"give --cp-comm-type {EXCHANGE}",
        )
    check_heads(transformer)


def kinds_of_exchange(transformer: TransformerConfig) -> list[str]:
    """``--cp-comm-type``: one for all layers, or one for each."""
    asked_for = transformer.cp_comm_type or "p2p"
    return [asked_for] if isinstance(asked_for, str) else list(asked_for)


def check_heads(transformer: TransformerConfig) -> None:
    """Refuse heads that context- and tensor-parallel ranks cannot share.

    Raises:
        FlagError: the message names the flag, its value and the remedy.
    """
    context, tensor = transformer.context_parallel_size, transformer.tensor_model_parallel_size
    for name, number in (
        ("num_attention_heads", transformer.num_attention_heads),
        ("num_query_groups", transformer.num_query_groups),
    ):
        if number % (context * tensor):
            sizes = [str(size) for size in range(1, number + 1) if not number % (size * tensor)]
            per_rank = "" if tensor == 1 else f" times --tensor-model-parallel-size {tensor}"
            raise FlagError(
                name,
                number,
                f", which --context-parallel-size {context}{per_rank} does not divide, so that "
                "ranks cannot share the heads",
                f"use one of {', '.join(sizes)} there"
                if sizes
                else "use a --tensor-model-parallel-size that divides it",
            )


def gather_sequence(parts: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Exchange a part of the sequence with all heads for the whole sequence with a part of them.

    Args:
        parts: tensors [S / C, B, N, H] with the same S, B and H: queries, keys and values. They
            travel together in one all-to-all.
        group: the C context-parallel ranks.

    Returns:
        For each one [S, B, N / C, H], in the order of the sequence.
    """
    num_ranks = group.size()
    heads = [part.shape[2] // num_ranks for part in parts]
    by_rank = torch.cat([part.unflatten(2, (num_ranks, -1)) for part in parts], dim=3)
    received = all_to_all(group, by_rank.movedim(2, 0).contiguous())
    early, late = received.unflatten(1, (2, -1)).unbind(dim=1)
    return list(torch.cat([early, late.flip(0)]).flatten(0, 1).split(heads, dim=2))


def scatter_sequence(whole: Tensor, group: ProcessGroup) -> Tensor:
    """Undo :func:`gather_sequence`: [S, B, N / C, H] to [S / C, B, N, H]."""
    num_ranks = group.size()
    early, late = whole.unflatten(0, (2, num_ranks, -1))
    by_rank = torch.stack([early, late.flip(0)], dim=1).flatten(1, 2)
    return all_to_all(group, by_rank.contiguous()).movedim(0, 2).flatten(2, 3)
