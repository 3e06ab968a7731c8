"""What SECURITY.md says of others' code, so that it is noticed when it is no longer so."""

import contextlib
import inspect
import os
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

SECURITY = (Path(__file__).parents[2] / "SECURITY.md").read_text()


class Call:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_resuming_trusts_the_checkpoint(tmp_path: Path) -> None:
    """If this fails, torch has become safer, and SECURITY.md may say so."""
    assert "`.metadata` is read by `pickle.load` without any restriction" in SECURITY
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Call(tmp_path / "evidence")))
    with contextlib.suppress(AttributeError):  # what was called is no metadata
        FileSystemReader(tmp_path).read_metadata()
    assert (tmp_path / "evidence").exists()
    assert "weights_only=False" in inspect.getsource(DefaultLoadPlanner.load_bytes)


def test_the_files_that_are_named_exist() -> None:
    words = SECURITY.replace("`", " ").replace(",", " ").split()
    tests = [word for word in words if word.startswith("tests/")]
    assert len(tests) == 4 and all((Path(__file__).parents[2] / name).exists() for name in tests)
