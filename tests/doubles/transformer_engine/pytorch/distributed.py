"""``pytorch/distributed.py``: recomputation and generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..not_stood_for import NotStoodFor


def checkpoint(*args: Any, **kwargs: Any) -> Any:
    """Recompute with low precision's state. Megatron calls it only with FP8 and FP4."""
    raise NotStoodFor("checkpoint (FP8)")


@contextlib.contextmanager
def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> Iterator[None]:
    """Keep low precision's state apart in a pass of recomputation; there is none."""
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    """Whether this is within such a pass, in low precision."""
    return False


class CudaRNGStatesTracker:
    """``CudaRNGStatesTracker``: named generators. Megatron uses it with ``--te-rng-tracker``."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all states."""
        self.states_: dict[str, Any] = {}
        self.seeds_: set[int] = set()

    def get_states(self) -> dict[str, Any]:
        """A copy of the names with their states."""
        return dict(self.states_)

    def set_states(self, states: dict[str, Any]) -> None:
        """Take over names and states."""
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        """Make a state of its own; neither its seed nor its name may be in use."""
        if seed in self.seeds_:
            raise RuntimeError(f"seed {seed} already exists")
        self.seeds_.add(seed)
        if name in self.states_:
            raise RuntimeError(f"cuda rng state {name} already exists")
        kept = torch.cuda.get_rng_state()
        torch.cuda.manual_seed(seed)
        self.states_[name] = torch.cuda.get_rng_state()
        torch.cuda.set_rng_state(kept)

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from a named state for a while."""
        if name not in self.states_:
            raise KeyError(f"cuda rng state {name} is not added")
        kept = torch.cuda.get_rng_state()
        torch.cuda.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.cuda.get_rng_state()
            torch.cuda.set_rng_state(kept)
