"""A small exported model with random weights, and text of two kinds for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dynmoe.use.load import load_config, load_model, load_tokenizer
from tests.helpers.tiny_export import export_tiny, make_tokenizer

SENTENCE = "the house of a man who was not at home when it rained is empty and cold"


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """3 layers, the second of them dense, 8 experts, thresholds that differ by layer; a curve."""
    folder = tmp_path_factory.mktemp("run") / "exported"
    curve = [
        {"experts_per_token": 1.0, "threshold": 0.0, "loss": 8.5},
        {"experts_per_token": 2.0, "threshold": 0.6, "loss": 8.25},
    ]
    settings = {"routing": "top_p", "threshold": [0.5, None, 0.7], "budget_curve": curve}
    export_tiny(folder, tokenizer_model, **settings)
    return folder


@pytest.fixture(scope="session")
def loaded(exported: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    return load_model(exported, load_config(exported)), load_tokenizer(exported)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prose and figures, about 2000 and 1200 tokens, the second as plain text."""
    folder = tmp_path_factory.mktemp("texts")
    words = SENTENCE.split()
    prose = [
        {"text": " ".join(words[(i * k) % len(words)] for k in range(40)), "source": f"s{i % 2}"}
        for i in range(1, 40)
    ]
    (folder / "prose.jsonl").write_text("".join(json.dumps(record) + "\n" for record in prose))
    figures = "\n".join(f"{i} + {i * i} = {i + i * i};" for i in range(100))
    (folder / "figures.txt").write_text(figures)
    return {"prose": folder / "prose.jsonl", "figures": folder / "figures.txt"}
