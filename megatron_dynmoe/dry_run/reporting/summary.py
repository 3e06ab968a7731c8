"""From what was recorded to what is reported: sums over the second step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from megatron_dynmoe.dry_run.recording.collectives import Collective
from megatron_dynmoe.dry_run.recording.memory import Peak
from megatron_dynmoe.dry_run.recording.places import DISPATCH, PARTS, Place
from megatron_dynmoe.dry_run.recording.recorder import Recorder
from megatron_dynmoe.dry_run.recording.schedule import BETWEEN, MicroBatches
from megatron_dynmoe.dry_run.reporting.on_host import why_on_host
from megatron_dynmoe.dry_run.reporting.result import (
    PHASES,
    Holder,
    Kernels,
    OffDevice,
    Result,
    Sent,
    Wait,
)

NUM_HOLDERS = 10
_PASSES = ("forward", "backward")
_PER = ("layer and micro-batch", "micro-batch", "step")


def summarize(recorder: Recorder, micro_batches: MicroBatches) -> Result:
    """Sum up what was recorded of the second step."""
    step = _Step(recorder, micro_batches)
    all_peaks = recorder.memory.peaks()
    peaks = {phase: all_peaks[phase] for phase in PHASES if phase in all_peaks}
    layer = step.layer_to_show()
    kernels = step.kernels_of_layer(layer)
    of_experts = [row for row in kernels if row.part in (DISPATCH, PARTS["mlp.experts"])]
    return Result(
        micro_batches=micro_batches.planned,
        micro_batches_run=micro_batches.run,
        layers=step.layers,
        state_bytes=recorder.state_bytes,
        peak_bytes={phase: peak.num_bytes for phase, peak in peaks.items()},
        peak_lines={phase: peak.place.line for phase, peak in peaks.items()},
        holders=_holders(peaks),
        waits=step.waits(recorder.waits),
        graph_breaks=step.graph_breaks(),
        kernel_layer=layer,
        kernels=kernels,
        kernels_outside=step.kernels_outside(),
        kernels_per_step=step.by_phase(recorder.kernels),
        kernels_between=step.kernels_between(),
        flops=step.by_phase(recorder.flops),
        traffic=step.by_phase(recorder.traffic),
        expert_traffic=sum(row.traffic.get("forward", 0) for row in of_experts),
        expert_kept=sum(row.kept for row in of_experts),
        sent=step.sent(),
        copies=step.copies(),
        off_device=step.off_device(),
    )


def _holders(peaks: Mapping[str, Peak]) -> list[Holder]:
    """The largest holders at each peak, from the highest peak on, and what they hold at others."""
    held = {
        phase: {(each.place.line, each.place.caller): each for each in peak.storages}
        for phase, peak in peaks.items()
    }
    highest_first = sorted(peaks, key=lambda phase: -peaks[phase].num_bytes)
    shown = dict.fromkeys(key for phase in highest_first for key in [*held[phase]][:NUM_HOLDERS])
    return [
        Holder(
            line=line,
            caller=caller,
            num_bytes={phase: held[phase][line, caller].num_bytes for phase in phases},
            tensors={phase: held[phase][line, caller].tensors for phase in phases},
        )
        for line, caller in shown
        if (phases := [phase for phase in peaks if (line, caller) in held[phase]])
    ]


class _Step:
    """The second step."""

    def __init__(self, recorder: Recorder, micro_batches: MicroBatches) -> None:
        self.recorder, self.micro_batches = recorder, micro_batches
        self.layers = sorted({place.layer for _, place, _ in recorder.kernels if place.layer})

    def whole(self, counter: Mapping[Any, float]) -> Iterator[tuple[Any, float]]:
        """Yield what was counted, and how often it happens in the step."""
        for key, count in counter.items():
            if key[0].phase in (*PHASES, BETWEEN):
                yield key, count * self.micro_batches.times(key[0])

    def sample(self, counter: Mapping[Any, float]) -> Iterator[tuple[Any, float]]:
        """Yield what was counted, and how often it happens in a micro-batch of the middle."""
        for key, count in counter.items():
            if key[0].phase in (*PHASES, BETWEEN) and self.micro_batches.in_sample(key[0]):
                yield key, count / self.micro_batches.group

    def by_phase(self, counter: Mapping[Any, float]) -> dict[str, float]:
        """Sum up the step by phase."""
        sums = _sums((key[0].phase, count) for key, count in self.whole(counter))
        return {phase: sums[phase] for phase in (*PHASES, BETWEEN) if phase in sums}

    def waits(self, counter: Mapping[Any, int]) -> list[Wait]:
        """Host waits: those of layers first, and the most frequent first."""

        def by_line(counted: Iterable[tuple[Any, float]]) -> dict[tuple[str, str, str], float]:
            return _sums(((at.line, at.caller, call), count) for (_, at, call), count in counted)

        layers = defaultdict(set)
        for (_, place, call), _count in self.whole(counter):
            layers[place.line, place.caller, call].add(place.layer)
        in_sample = by_line(self.sample(counter))
        waits = []
        for key, per_step in by_line(self.whole(counter)).items():
            line, caller, call = key
            per, count = "step", per_step
            if in_sample.get(key, 0) * self.micro_batches.planned == per_step:
                per, count = "micro-batch", in_sample[key]
                if 0 not in layers[key]:
                    per, count = f"layer and {per}", count / len(layers[key])
            waits.append(Wait(line, caller, call, per, count, per_step))
        return sorted(waits, key=lambda wait: (_PER.index(wait.per), -wait.count))

    def graph_breaks(self) -> list[Wait]:
        """Waits and blocking copies of the passes, in the order of :meth:`waits`."""
        copies = {(*key, "copy to the device"): n for key, n in self.recorder.copies.items()}
        both = {**self.recorder.waits, **copies}
        return self.waits({key: n for key, n in both.items() if key[0].phase in _PASSES})

    def layer_to_show(self) -> int:
        """The last one of those with most kernels, which are those with experts; 0: no layers."""
        kernels = _sums(
            (place.layer, count)
            for (_, place, _), count in self.sample(self.recorder.kernels)
            if place.layer
        )
        return max(kernels, key=lambda layer: (kernels[layer], layer), default=0)

    def kernels_of_layer(self, layer: int) -> list[Kernels]:
        """The kernels of a layer, by part, most first."""
        parts = {place.part for _, place, _ in self.recorder.kernels if place.layer == layer}
        rows = [self._kernels_of_part(layer, part) for part in parts if layer]
        return sorted(rows, key=lambda row: -row.forward - row.backward)

    def _kernels_of_part(self, layer: int, part: str) -> Kernels:
        kept = self.recorder.kept.get((layer, part), 0)
        return self._kernels(part, lambda place: (place.layer, place.part) == (layer, part), kept)

    def kernels_outside(self) -> Kernels:
        """The kernels of a micro-batch outside of layers."""
        kept = sum(size for (layer, _), size in self.recorder.kept.items() if not layer)
        return self._kernels("outside of layers", lambda place: not place.layer, kept)

    def kernels_between(self) -> dict[str, float]:
        """The kernels of the step that belong to neither a pass nor the optimizer, by file."""
        return _sums(
            (PurePath(place.file).stem, count)
            for (moment, place, _), count in self.whole(self.recorder.kernels)
            if moment.phase == BETWEEN
        )

    def _kernels(self, part: str, belongs: Callable[[Place], bool], kept: int) -> Kernels:
        counted = [
            (moment.phase, PurePath(place.file).stem, count)
            for (moment, place, _), count in self.sample(self.recorder.kernels)
            if belongs(place)
        ]
        phases = _sums((phase, count) for phase, _, count in counted)
        files = _sums((file, count) for _, file, count in counted)
        traffic = _sums(
            (moment.phase, num_bytes)
            for (moment, place), num_bytes in self.sample(self.recorder.traffic)
            if belongs(place)
        )
        forward, backward = (phases.get(phase, 0) for phase in _PASSES)
        return Kernels(part, forward, backward, files, traffic, kept)

    def sent(self) -> list[Sent]:
        """Communication between at least two ranks, the most bytes first."""
        phases, awaited = defaultdict(set), defaultdict(set)
        for (moment, what), _count in self.whole(self.recorder.sent):
            phases[_kind(what)].add(moment.phase)
        for what, place in self.recorder.collectives.awaited:
            awaited[_kind(what)].add(place.line)
        whole = [*self.whole(self.recorder.sent)]
        calls = _sums((_kind(what), count) for (_, what), count in whole)
        num_bytes = _sums((_kind(what), count * what.num_bytes) for (_, what), count in whole)
        return [
            Sent(
                kind=kind.kind,
                group=kind.group,
                size=kind.size,
                line=kind.place.line,
                caller=kind.place.caller,
                phases=sorted(phases[kind]),
                is_async=kind.is_async,
                calls=calls[kind],
                num_bytes=total,
                awaited=sorted(awaited[kind]),
            )
            for kind, total in num_bytes.items()
            if kind.size > 1
        ]

    def copies(self) -> dict[str, float]:
        """Copies from the host that block it, by line."""
        return _sums((place.line, count) for (_, place), count in self.whole(self.recorder.copies))

    def off_device(self) -> list[OffDevice]:
        """Tensors that are made on the host, mistakes first."""
        counted = _sums(
            ((place.file, place.line, place.caller, place.function, made), count)
            for (_, place, made), count in self.whole(self.recorder.off_device)
        )
        found = [
            OffDevice(line, caller, function, made, count, why_on_host(file, function, made))
            for (file, line, caller, function, made), count in counted.items()
        ]
        return sorted(found, key=lambda each: bool(each.why))


def _sums(counted: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    """Add up what has the same key; the largest sum first."""
    sums: dict[Any, float] = defaultdict(float)
    for key, count in counted:
        sums[key] += count
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _kind(collective: Collective) -> Collective:
    """What is the same in all layers, in both directions and for every size."""
    place = Place(collective.place.line, collective.place.caller)
    return collective._replace(place=place, num_bytes=0)
