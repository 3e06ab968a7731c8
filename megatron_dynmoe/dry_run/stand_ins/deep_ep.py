"""DeepEP on devices that do not exist, for ``--moe-token-dispatcher-type flex``.

A token travels once to each rank that has an expert of it. How many do is made up for a balanced
load, as in :mod:`~.rows`. DeepEP's own buffers, which it takes from CUDA itself, are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import lgamma
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megatron_dynmoe.backends.no_driver import returns
from megatron_dynmoe.dry_run.devices import known

if TYPE_CHECKING:
    from megatron_dynmoe.dry_run.recording.recorder import Recorder


class Handle(NamedTuple):
    """What combine has to know of dispatch.

    Attributes:
        is_token_in_rank, places: [T, ranks], bool and int32.
        sources: [number of tokens that were received], int32.
    """

    is_token_in_rank: Tensor
    places: Tensor
    sources: Tensor


def install(recorder: Recorder, experts_per_token: float, imbalance: float) -> None:
    """Let ``import deep_ep`` find this. Call before anything imports Megatron.

    Args:
        experts_per_token: the mean.
        imbalance: how many times its share this GPU gets.
    """

    class OfThisRun(Buffer):
        pass

    OfThisRun.recorder, OfThisRun.load = recorder, (experts_per_token, imbalance)
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    vars(package).update(Buffer=OfThisRun, utils=utils)
    vars(utils).update(EventHandle=_Event, EventOverlap=_Event)
    sys.modules.update({"deep_ep": package, "deep_ep.utils": utils})


def ranks_of_a_token(num_experts: int, num_ranks: int, experts_per_token: float) -> float:
    """Compute to how many ranks a token goes on average if any choice of experts is as likely.

    A rank is left out if all of a token's k experts are among the E - E/R of the others:
    R (1 - C(E - E/R, k) / C(E, k)), with the gamma function for a k that is not a whole number.
    """
    others, k = num_experts - num_experts // num_ranks, experts_per_token
    if k > others:
        return num_ranks
    logs = lgamma(others + 1) - lgamma(others - k + 1) - lgamma(num_experts + 1)
    missed = logs + lgamma(num_experts - k + 1)
    return num_ranks * (1 - float(torch.e**missed))


class _Event:
    """An event that has always happened."""

    def __init__(self, *_: object) -> None:
        pass

    def current_stream_wait(self) -> None:
        pass


class Buffer:
    """DeepEP's interface for high throughput, as far as Megatron calls it."""

    recorder: Recorder
    load: tuple[float, float]
    set_num_sms: Callable[[int], None] = staticmethod(returns(None))
    get_dispatch_config = get_combine_config = staticmethod(
        returns(
            SimpleNamespace(
                get_nvl_buffer_size_hint=returns(0), get_rdma_buffer_size_hint=returns(0)
            )
        )
    )

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **_: object) -> Any:
        """Count tokens per rank and expert, int32, and say which goes where, [T, ranks] bool."""
        with self.recorder.one_kernel("deep_ep layout"):
            counts = topk_idx.new_empty(self.group.size(), dtype=torch.int32)
            of_experts = topk_idx.new_empty(num_experts, dtype=torch.int32)
            where = topk_idx.new_empty(len(topk_idx), self.group.size(), dtype=torch.bool)
        self.recorder.keep((counts, of_experts, where))
        return counts, None, of_experts, where, _Event()

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        **_: object,
    ) -> tuple[Any, ...]:
        """Send tokens [T, H]. The host waits for their number, but not with a handle."""
        if handle is not None:
            (rows,) = self._transfer("dispatch", [x], len(handle.sources))
            return rows, None, None, None, None, _Event()
        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None
        (experts_per_token, imbalance), num_ranks = self.load, self.group.size()
        num_experts = len(num_tokens_per_expert)
        copies = ranks_of_a_token(num_experts, num_ranks, experts_per_token)
        received = round(len(x) * copies * imbalance)
        num_rows = round(len(x) * experts_per_token * imbalance)
        self.recorder.num_true[received] = num_rows
        sent = [x, topk_idx, topk_weights]
        tokens, ids, weights = self._transfer("dispatch", sent, received)
        self.recorder.wait("deep_ep dispatch")
        with self.recorder.one_kernel("deep_ep places"):
            places = is_token_in_rank.new_empty(is_token_in_rank.shape, dtype=torch.int32)
            sources = places.new_empty(received)
        self.recorder.keep((places, sources))
        counts = known.split(num_rows, num_experts // num_ranks).tolist()
        handle = Handle(is_token_in_rank, places, sources)
        return tokens, ids, weights, counts, handle, _Event()

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, **_: object
    ) -> tuple[Any, ...]:
        """Send rows back to where they came from, which adds them up."""
        returned = [x] if topk_weights is None else [x, topk_weights]
        rows, *weights = self._transfer("combine", returned, len(handle.is_token_in_rank))
        return rows, weights[0] if weights else None, _Event()

    def _transfer(self, name: str, tensors: list[Tensor], received: int) -> list[Tensor]:
        """One kernel that sends these rows and receives as many as that."""
        with self.recorder.one_kernel(f"deep_ep {name}"):
            results = [tensor.new_empty(received, *tensor.shape[1:]) for tensor in tensors]
        self.recorder.keep(results)
        num_rows = max(received, len(tensors[0]))
        row_bytes = sum(part.shape[1:].numel() * part.element_size() for part in tensors)
        self.recorder.note_sent(f"DeepEP {name}", self.group, num_rows * row_bytes)
        return results
