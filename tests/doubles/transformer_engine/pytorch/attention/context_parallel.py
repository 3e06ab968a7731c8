"""``dot_product_attention/context_parallel.py``: a sequence that is split over ranks.

Rank r of C holds chunks r and 2C - 1 - r of 2C. The original sends keys and values around a ring
(``p2p``), gathers them (``all_gather``) or exchanges heads (``a2a``). The results differ by the
order of sums only, so here all gather keys and values, and each keeps its own limits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...not_stood_for import NotStoodFor

# utils.py, get_attention_backend: of the implementations only those for 16 bits split a sequence.
# Tests let float32 stand in for them, because a comparison in 16 bits would hide much.
SPLITS_FLOAT32 = False


def check_split(query: Tensor, key: Tensor, comm_type: str, num_ranks: int) -> None:
    """The original's limits, and what this double does not stand for."""
    if query.dtype not in (torch.float16, torch.bfloat16) and not SPLITS_FLOAT32:
        raise ValueError(
            "No dot product attention backend is available for the provided inputs. Please"
            " run with NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 to find out the reasons for"
            " disabling all backends."
        )
    if comm_type == "a2a+p2p":
        raise NotStoodFor("cp_comm_type a2a+p2p")
    if comm_type not in ("p2p", "all_gather", "a2a"):
        raise ValueError(f"Unsupported communication type: {comm_type}!")
    assert query.shape[0] % 2 == key.shape[0] % 2 == 0, (
        "Sequence length per GPU needs to be divisible by 2!"
    )
    assert comm_type != "a2a" or query.shape[2] % num_ranks == key.shape[2] % num_ranks == 0, (
        "cp_comm_type='a2a' requires num_heads % cp_size == 0 for Q, K, V. Found num_heads_q ="
        f" {query.shape[2]}, num_heads_kv = {key.shape[2]}, cp_size = {num_ranks}."
    )


def positions(length: int, group: Any, device: torch.device) -> Tensor:
    """The positions in the sequence of all ranks' tokens, [C, length] int64."""
    num_ranks = group.size()
    chunks = torch.arange(2 * num_ranks * (length // 2), device=device).unflatten(
        0, (-1, length // 2)
    )
    early, late = chunks.chunk(2)
    return torch.cat((early, late.flip(0)), dim=1)


class Gathered(torch.autograd.Function):
    """All ranks' parts [S / C, ...], one behind the other: [S, ...], not in the order of tokens."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None
