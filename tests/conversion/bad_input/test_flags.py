"""Tokenizers and routings that the command line names and that cannot work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conversion.bad_input.damage import (
    Refused,
)


@pytest.mark.parametrize("content", (b"", b"garbage", b"\x80\x02cos\nsystem\n(S'false'\ntR."))
@pytest.mark.parametrize("name", ("t.model", "tokenizer.json", "folder"))
def test_what_is_no_tokenizer(load: Path, refused: Refused, name: str, content: bytes) -> None:
    tokenizer = load.parent / name
    if name == "folder":
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_bytes(content)
    else:
        tokenizer.write_bytes(content)
    refused.to_hf(
        load, f"--tokenizer is {tokenizer}", flags=("--tokenizer", str(tokenizer)), code=2
    )


def test_a_tokenizer_that_is_not_there(load: Path, refused: Refused) -> None:
    tokenizer = load.parent / "missing.model"
    refused.to_hf(
        load, f"--tokenizer is {tokenizer}", flags=("--tokenizer", str(tokenizer)), code=2
    )


def test_a_tokenizer_with_code_of_its_own(load: Path, refused: Refused) -> None:
    folder = load.parent / "tokenizer"
    folder.mkdir()
    evidence = load.parent / "evidence"
    (folder / "code.py").write_text(f"open({str(evidence)!r}, 'w')\nclass T: pass\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}})
    )
    refused.to_hf(load, str(folder), flags=("--tokenizer", str(folder)), code=2)
    assert not evidence.exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--threshold", "0.3"), ("--threshold needs --routing",)),
        (("--routing", "top_p", "--threshold", "2"), ("threshold is 2",)),
        (("--routing", "dtop_p"), ("target_experts_per_token",)),
        (("--routing", "top_k"), ("top_k", "knows no k")),
        (("--routing", "best"), ("routing is 'best'",)),
    ],
    ids=str,
)
def test_another_routing(model: Path, refused: Refused, flags: tuple, says: tuple) -> None:
    refused.from_hf(model, *says, flags=flags, code=2)
