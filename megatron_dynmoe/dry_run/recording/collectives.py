"""What is sent between GPUs: how much, in which group, when it starts and who waits for it."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch._C._distributed_c10d import FakeWork
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from megatron_dynmoe.backends.no_driver import replace
from megatron_dynmoe.dry_run.recording.places import Place

# Names of the operations of PyTorch, and of what they are.
_KINDS = {
    "allgather": "all-gather",
    "allreduce": "all-reduce",
    "alltoall": "all-to-all",
    "barrier": "barrier",
    "broadcast": "broadcast",
    "gather": "gather",
    "recv": "receive",
    "reduce_scatter": "reduce-scatter",
    "reduce": "reduce",
    "scatter": "scatter",
    "send": "send",
}


class Collective(NamedTuple):
    """One kind of communication of one line.

    Attributes:
        group: Megatron's name of the group.
        size: number of its ranks.
        is_async: whether the line goes on while it runs.
        num_bytes: the larger of what a rank gives and gets, for one call.
    """

    kind: str
    group: str
    size: int
    place: Place
    is_async: bool
    num_bytes: int


class Collectives:
    """Follows communication from its start to the wait for it.

    Attributes:
        awaited: how often each collective was awaited, by place of the wait.
    """

    def __init__(self, places: Any) -> None:
        self.awaited: Counter[tuple[Collective, Place]] = Counter()
        self._places = places
        self._running: dict[int, tuple[Any, Collective]] = {}
        wait = FakeWork.wait

        def note_and_wait(work: FakeWork, *args: Any) -> bool:
            self._end(work)
            return wait(work, *args)

        replace(FakeWork, wait=note_and_wait)

    def start(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], place: Place
    ) -> tuple[Collective, Any]:
        """Start an operation of ``torch.ops.c10d``.

        Returns:
            What it is, and its result.
        """
        name = function._opname
        given = {
            argument.name: value
            for argument, value in zip(function._schema.arguments, args, strict=False)
        } | kwargs
        group = ProcessGroup.unbox(given["process_group"])
        collective = Collective(
            next(kind for start, kind in _KINDS.items() if name.strip("_").startswith(start)),
            group.group_desc,
            group.size(),
            place,
            # A send or a receive is always awaited by the caller.
            bool(given.get("async_op", True)),
            _num_bytes(given),
        )
        if "coalesced" in name:  # fake tensors do not take these
            work: Any = FakeWork()
            work.seq_id = 0
            result = work.boxed()
        else:
            result = function(*args, **kwargs)
            boxed = result[-1] if isinstance(result, tuple | list) else result
            work = FakeWork.unbox(boxed)
        self._running[id(work)] = work, collective
        return collective, result

    def _end(self, work: Any) -> None:
        _, collective = self._running.pop(id(work), (None, None))
        if collective is not None:
            self.awaited[collective, self._places.now()] += 1


def _num_bytes(given: dict[str, Any]) -> int:
    """The larger of the bytes that go in and those that come out."""
    sizes: Counter[bool] = Counter()
    for name, value in given.items():
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                sizes[name.startswith("output")] += tensor.numel() * tensor.element_size()
    return max(sizes.values(), default=0)
