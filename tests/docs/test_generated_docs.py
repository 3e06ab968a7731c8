"""The tables of the docs that follow from code say what the code says."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = runpy.run_path(str(ROOT / "tools/generate_docs.py"))["DOCUMENTS"]
WITH_TRITON = {"benchmarks.md"}  # made from its kernels


@pytest.mark.parametrize("name", sorted(DOCUMENTS.keys() - WITH_TRITON))
def test_is_up_to_date(name):
    compare(name)


@pytest.mark.triton
@pytest.mark.parametrize("name", sorted(WITH_TRITON))
def test_is_up_to_date_with_triton(name):
    pytest.importorskip("triton")
    compare(name)


def compare(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert text == DOCUMENTS[name](), "run python tools/generate_docs.py"
