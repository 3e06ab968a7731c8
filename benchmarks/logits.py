"""Router logits: normal ones, and those of a trained router."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from benchmarks import measure

TRAINED = measure.ROOT / "benchmarks" / "data" / "quickstart_logits.pt"


def normal_logits(num_tokens: int, num_experts: int) -> torch.Tensor:
    """[T, E] float32, independent."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_tokens, num_experts, generator=generator)


def trained_logits(num_tokens: int) -> torch.Tensor:
    """[T, 16] float32, of real text in a trained router; repeated if the file has fewer than T."""
    logits_TE = read_logits(TRAINED)
    return logits_TE.repeat(-(-num_tokens // len(logits_TE)), 1)[:num_tokens]


def read_logits(path: Path) -> torch.Tensor:
    """The logits in a file of benchmarks/collect_logits.py, [T, E] float32.

    Raises:
        ValueError: the file does not exist, or holds something else.
    """
    try:
        logits_TE = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"logits {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(logits_TE, torch.Tensor) or logits_TE.dim() != 2:
        raise ValueError(f"logits {path}: it must hold one tensor [tokens, experts]")
    return logits_TE.float()
