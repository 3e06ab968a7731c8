"""What several modules of conversion tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conversion.bad_input.damage import Refused


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(tmp_path, capsys)
