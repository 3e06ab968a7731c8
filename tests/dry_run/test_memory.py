"""The journal of allocations, against a list that is kept beside it."""

import random

import torch

from megatron_dynmoe.dry_run.recording.memory import GRANULARITY, AllocationJournal
from megatron_dynmoe.dry_run.recording.places import Place

A, B = Place("a.py:1", "x.py:1"), Place("b.py:2")


def blocks(number: int) -> torch.Tensor:
    return torch.empty(number * GRANULARITY, dtype=torch.uint8)


def test_the_peak_of_each_phase_and_who_holds_it():
    memory = AllocationJournal()
    memory.enter("build")
    weights = blocks(10)
    memory.add(weights, A)
    memory.enter("forward")
    kept, passing = blocks(3), blocks(5)
    memory.add(kept, B)
    memory.add(passing, B._replace(layer=7))  # another layer of the same line
    del passing
    memory.enter("backward")
    memory.add(last := blocks(1), A._replace(derived=True))
    assert memory.num_bytes == 14 * GRANULARITY

    peaks = memory.peaks()
    assert {phase: peak.num_bytes // GRANULARITY for phase, peak in peaks.items()} == {
        "build": 10,
        "forward": 18,
        "backward": 14,
    }
    held = [
        (each.place, each.num_bytes // GRANULARITY, each.tensors)
        for each in peaks["forward"].storages
    ]
    assert held == [(A, 10, 1), (B, 8, 2)]
    assert peaks["forward"].place.layer == 7 and peaks["backward"].place.derived
    assert last.numel()


def test_a_view_and_the_storage_itself_count_once_and_as_a_whole():
    memory = AllocationJournal()
    memory.enter("forward")
    whole = blocks(4)
    memory.add(whole, A)
    memory.add(whole[:5], B)
    part = whole[3:]
    del whole  # the view keeps the storage
    assert memory.num_bytes == 4 * GRANULARITY
    del part
    assert memory.num_bytes == 0


def test_sizes_are_rounded_as_the_allocator_does():
    memory = AllocationJournal()
    memory.enter("forward")
    memory.add(tensor := torch.empty(GRANULARITY + 1, dtype=torch.uint8), A)
    assert memory.num_bytes == 2 * GRANULARITY and tensor.numel()


def test_any_order_of_allocations_and_releases():
    draw = random.Random(0)
    memory, alive, highest = AllocationJournal(), [], {}
    for step in range(300):
        phase = ("forward", "backward")[step // 20 % 2]
        if step % 20 == 0:
            memory.enter(phase)
        if draw.random() < 0.6 or not alive:
            alive.append(blocks(draw.randrange(1, 9)))
            memory.add(alive[-1], draw.choice((A, B)))
        else:
            alive.pop(draw.randrange(len(alive)))
        now = sum(map(len, alive))
        highest[phase] = max(highest.get(phase, 0), now)
        assert memory.num_bytes == now
    peaks = memory.peaks()
    assert {phase: peak.num_bytes for phase, peak in peaks.items()} == highest
    for peak in peaks.values():
        assert sum(each.num_bytes for each in peak.storages) == peak.num_bytes
