"""What a dry run finds, as it leaves the process that ran it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PHASES = ("forward", "backward", "optimizer")
_CONTROLLER = ("pi", "counters", "update")  # files


def controllers(kernels: Mapping[str, float]) -> float:
    """How many of the kernels of a step, by file, are the controller's."""
    return sum(kernels.get(file, 0) for file in _CONTROLLER)


@dataclass(frozen=True)
class Holder:
    """Memory of one line of code: its bytes at the peak of each phase, and as how many tensors."""

    line: str
    caller: str
    num_bytes: dict[str, int]
    tensors: dict[str, int]


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the device.

    Attributes:
        call: what waits, or copies.
        per: ``layer and micro-batch``, ``micro-batch`` or ``step``.
        count: how often, per that.
        per_step: how often in a whole step.
    """

    line: str
    caller: str
    call: str
    per: str
    count: float
    per_step: float


@dataclass(frozen=True)
class Kernels:
    """Kernels that one part launches in one micro-batch.

    Attributes:
        files: how many of them, by file.
        traffic: bytes that they read and write, by phase.
        kept: bytes that the part keeps for the backward pass.
    """

    part: str
    forward: float
    backward: float
    files: dict[str, float]
    traffic: dict[str, float]
    kept: int


@dataclass(frozen=True)
class Sent:
    """One kind of communication.

    Attributes:
        calls, num_bytes: in a step.
        awaited: if the line goes on meanwhile, the lines that wait for it.
    """

    kind: str
    group: str
    size: int
    line: str
    caller: str
    phases: list[str]
    is_async: bool
    calls: float
    num_bytes: float
    awaited: list[str]


@dataclass(frozen=True)
class OffDevice:
    """Tensors of a step that are made on the host.

    Attributes:
        function: of the line.
        why: why that is right; empty if it is a mistake.
    """

    line: str
    caller: str
    function: str
    made: str
    per_step: float
    why: str


@dataclass(frozen=True)
class Result:
    """One dry run.

    Attributes:
        micro_batches, micro_batches_run: of a step, and how many of them were run.
        layers: numbers of the layers on this rank.
        state_bytes: what is alive between steps.
        peak_bytes, peak_lines: of each phase, and the line that reached it.
        holders: the largest first, by the highest peak.
        graph_breaks: what a CUDA graph of a pass cannot hold: waits, and copies that block.
        kernel_layer: the layer whose kernels are listed, 0 if there is none.
        kernels: by part of that layer.
        kernels_outside: of a micro-batch, outside of layers.
        kernels_per_step: by phase.
        kernels_between: of those that belong to none, how many by file.
        flops: of a step, by phase.
        traffic: bytes that kernels read and write in a step, by phase.
        expert_traffic: the same of the experts of the layer that is listed, with the rows' way to
            them and back, in the forward pass of a micro-batch.
        expert_kept: bytes that these keep for the backward pass.
        copies: from the host that block it, in a step, by line.
    """

    micro_batches: int
    micro_batches_run: int
    layers: list[int]
    state_bytes: int
    peak_bytes: dict[str, int]
    peak_lines: dict[str, str]
    holders: list[Holder]
    waits: list[Wait]
    graph_breaks: list[Wait]
    kernel_layer: int
    kernels: list[Kernels]
    kernels_outside: Kernels
    kernels_per_step: dict[str, float]
    kernels_between: dict[str, float]
    flops: dict[str, float]
    traffic: dict[str, float]
    expert_traffic: float
    expert_kept: int
    sent: list[Sent]
    copies: dict[str, float]
    off_device: list[OffDevice]

    def to_json(self) -> str:
        """Write it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Read it."""
        fields: dict[str, Any] = json.loads(text)
        for name, kind in _LISTS.items():
            fields[name] = [kind(**each) for each in fields[name]]
        fields["kernels_outside"] = Kernels(**fields["kernels_outside"])
        return cls(**fields)

    @property
    def peak(self) -> int:
        """The highest of all phases."""
        return max(self.peak_bytes.values())

    @property
    def kernels_of_controller(self) -> float:
        """Those of a step."""
        return controllers(self.kernels_between)

    @property
    def mistakes(self) -> list[OffDevice]:
        """Tensors that are made on the host for no known reason."""
        return [tensors for tensors in self.off_device if not tensors.why]


_LISTS: dict[str, Any] = {
    "holders": Holder,
    "waits": Wait,
    "graph_breaks": Wait,
    "kernels": Kernels,
    "sent": Sent,
    "off_device": OffDevice,
}
