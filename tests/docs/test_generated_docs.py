"""The tables of the docs that follow from code say what the code says."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = runpy.run_path(str(ROOT / "tools/generate_docs.py"))["DOCUMENTS"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_is_up_to_date(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert text == DOCUMENTS[name](), "run python tools/generate_docs.py"
