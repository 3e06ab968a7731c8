"""Which storages are alive on the device, when, and who made them."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import NamedTuple

import torch

from megatron_dynmoe.dry_run.recording.places import Place

GRANULARITY = 512  # bytes to which CUDA's caching allocator rounds a tensor


class LiveStorages(NamedTuple):
    """The storages of one line that are alive at a moment."""

    place: Place
    num_bytes: int
    tensors: int


class Peak(NamedTuple):
    """The most bytes that were alive in one phase.

    Attributes:
        place: where the allocation was made that reached it.
        storages: the largest first.
    """

    num_bytes: int
    place: Place
    storages: list[LiveStorages]


class AllocationJournal:
    """A journal of allocations and releases.

    Attributes:
        num_bytes: what is alive now.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._alive: dict[int, int] = {}  # the entry in the journal of each storage
        # An allocation: its bytes and place. A release: None and the entry of the allocation.
        self._journal: list[tuple[int | None, Place | int]] = []
        self._phases: list[tuple[int, str]] = []  # the entry with which each begins

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self._phases.append((len(self._journal), phase))

    @property
    def num_entries(self) -> int:
        """How long the journal is."""
        return len(self._journal)

    def kept_since(self, entry: int) -> dict[tuple[int, str], int]:
        """Bytes that were added from an entry on and are alive, by layer and part of it."""
        kept: dict[tuple[int, str], int] = defaultdict(int)
        for each in self._alive.values():
            num_bytes, place = self._journal[each]
            if each >= entry and num_bytes is not None and isinstance(place, Place):
                kept[place.layer, place.part] += num_bytes
        return kept

    def add(self, tensor: torch.Tensor, place: Place) -> None:
        """Note the storage of a tensor on the device, if it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        num_bytes = -(-storage.nbytes() // GRANULARITY) * GRANULARITY
        self._alive[key] = len(self._journal)
        self._journal.append((num_bytes, place))
        self.num_bytes += num_bytes
        weakref.finalize(storage, self._release, key, num_bytes).atexit = False

    def _release(self, key: int, num_bytes: int) -> None:
        self._journal.append((None, self._alive.pop(key)))
        self.num_bytes -= num_bytes

    def peaks(self) -> dict[str, Peak]:
        """Find the peak of each phase; a phase that comes several times has one."""
        highest: dict[str, tuple[int, int]] = {}  # bytes, and the entries until then
        now = 0
        ends = [entry for entry, _ in self._phases[1:]] + [len(self._journal)]
        for (first, phase), end in zip(self._phases, ends, strict=True):
            highest[phase] = max(highest.get(phase, (0, 0)), (now, first))
            for entry in range(first, end):
                now += self._change(entry)
                highest[phase] = max(highest[phase], (now, entry + 1))
        return {
            phase: Peak(num_bytes, self._place_before(until), self._storages(until))
            for phase, (num_bytes, until) in highest.items()
        }

    def _change(self, entry: int) -> int:
        num_bytes, allocation = self._journal[entry]
        if num_bytes is not None:
            return num_bytes
        assert isinstance(allocation, int)
        return -(self._journal[allocation][0] or 0)

    def _place_before(self, until: int) -> Place:
        places = (self._journal[entry][1] for entry in range(until - 1, -1, -1))
        return next((place for place in places if isinstance(place, Place)), Place("nothing"))

    def _storages(self, until: int) -> list[LiveStorages]:
        alive: set[int] = set()
        for entry, (num_bytes, allocation) in enumerate(self._journal[:until]):
            if num_bytes is not None:
                alive.add(entry)
            elif isinstance(allocation, int):
                alive.remove(allocation)
        sizes: dict[Place, list[int]] = defaultdict(list)
        for entry in alive:
            num_bytes, place = self._journal[entry]
            assert num_bytes is not None and isinstance(place, Place)
            sizes[place._replace(layer=0)].append(num_bytes)
        found = [LiveStorages(place, sum(each), len(each)) for place, each in sizes.items()]
        return sorted(found, key=lambda storages: -storages.num_bytes)
