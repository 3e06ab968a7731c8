"""What a dry run is asked for, on its way into the process that runs it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Request:
    """One dry run.

    Attributes:
        words: the training's flags.
        world_size, rank: which process of how many.
        stage: its pipeline rank.
        gpu: what the device calls itself.
        capability: of its architecture, as NVIDIA counts them.
        memory: its bytes.
        experts_per_token: the mean count of every layer.
        imbalance: how many times the mean the experts of this GPU get.
    """

    words: list[str]
    world_size: int
    rank: int
    stage: int
    gpu: str
    capability: tuple[int, int]
    memory: int
    experts_per_token: float
    imbalance: float = 1.0

    def to_json(self) -> str:
        """Write it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read it."""
        fields = json.loads(text)
        return cls(**fields | {"capability": tuple(fields["capability"])})
