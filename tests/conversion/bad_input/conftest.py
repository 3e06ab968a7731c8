"""Good checkpoints and exports, to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_dynmoe.conversion.formats import FORMATS
from megatron_dynmoe.storage.manifest import MANIFEST
from tests.conversion.checkpoints import export


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A checkpoint and its export in every format."""
    root = tmp_path_factory.mktemp("good")
    return {format: export(root / format, format) for format in FORMATS}


@pytest.fixture
def load(good: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    """A Megatron checkpoint to damage, without the manifest that would find all damage first."""
    load = shutil.copytree(good["dynmoe"][0], tmp_path / "load")
    (load / "release" / MANIFEST).unlink()
    return load


@pytest.fixture
def model(good: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    """A Hugging Face folder to damage."""
    return shutil.copytree(good["dynmoe"][1], tmp_path / "model")
