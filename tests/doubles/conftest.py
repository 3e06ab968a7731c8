"""Tests of what holds of Transformer Engine: on a GPU with it they ask it, elsewhere the double."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.doubles.on_cpu import has_the_original


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``transformer_engine.pytorch``, the original or the double."""
    if has_the_original():
        import transformer_engine.pytorch
        import transformer_engine.pytorch.attention.rope
        import transformer_engine.pytorch.router

        return transformer_engine.pytorch
    import tests.doubles.transformer_engine.pytorch.attention.rope
    import tests.doubles.transformer_engine.pytorch.router

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    return tests.doubles.transformer_engine.pytorch


@pytest.fixture
def device(te: Any) -> torch.device:
    return torch.device("cuda" if has_the_original() else "cpu")


@pytest.fixture
def close() -> Any:
    """Compares; the original multiplies float32 in TF32 (common/gemm/cublaslt_gemm.cu)."""
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if has_the_original() else {}

    def compare(actual: torch.Tensor, expected: torch.Tensor, **kwargs: Any) -> None:
        expected = expected.to(actual.device, actual.dtype)
        torch.testing.assert_close(actual, expected, **({**tolerance, **kwargs}))

    return compare
