"""All-to-all of rows over a group, in plain collectives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def exchange(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Send part r to rank r; return what every rank sent here, in the order of the ranks."""
    sent = torch.tensor([len(part) for part in parts])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    rows = torch.cat(list(parts)).contiguous()
    result = rows.new_empty((int(received.sum()), *rows.shape[1:]))
    dist.all_to_all_single(result, rows, received.tolist(), sent.tolist(), group=group)
    return list(result.split(received.tolist()))
