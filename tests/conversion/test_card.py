"""The model card says what the settings say, also after a calibration."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dynmoe.conversion.hugging_face.card import (
    CARD,
    about_training,
    update_routing,
    write_card,
)

CONFIG = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 128,
    "routing": "dtop_p",
    "target_experts_per_token": 2.0,
    "threshold": [0.25, None, 0.25],
    "theta": [1.5, None, 0.75],
    "measured_experts_per_token": [1.5, None, 2.0],
}
ABOUT = {"steps": 100, "data": "book"}


def card(folder: Path, config: dict, about: dict = ABOUT) -> str:
    write_card(folder, config, about, "how to load", "bfloat16")
    return (folder / CARD).read_text()


def test_a_card_names_data_steps_routing_and_what_was_measured(tmp_path: Path) -> None:
    text = card(tmp_path, CONFIG)
    for line in (
        "| steps | 100 |",
        "| data | book |",
        "| vocab_size | 32,000 |",
        "| dtype | bfloat16 |",
        "| threshold | 0.25 |",  # the same in every layer
        "| theta | 1.5, -, 0.75 |",
        "| target_experts_per_token | 2.0 |",
    ):
        assert line in text
    assert "**1.750** on average; by layer 1.50, -, 2.00." in text
    assert text.count("@article") == 2


@pytest.mark.parametrize("measured", [None, []])
def test_what_was_not_measured_is_not_claimed(tmp_path: Path, measured: list | None) -> None:
    text = card(tmp_path, CONFIG | {"measured_experts_per_token": measured})
    assert "were not measured" in text and "on average" not in text


@pytest.mark.parametrize("splits", [True, False, None])
def test_what_chat_templates_need_is_said(tmp_path: Path, splits: bool | None) -> None:
    if splits is not None:
        config = {"split_special_tokens": splits}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ("split_special_tokens=False" in card(tmp_path, CONFIG)) is bool(splits)


def test_cards_of_other_models(tmp_path: Path) -> None:
    top_k = CONFIG | {"routing": "top_k", "num_experts_per_tok": 2, "threshold": None}
    text = card(tmp_path, top_k | {"theta": None, "measured_experts_per_token": None})
    assert "Every token uses 2 of 8 experts" in text and "measured" not in text.lower()
    text = card(tmp_path, top_k | {"num_experts": 0})
    assert "A dense language model" in text and "## Routing" not in text


def test_a_calibration_changes_the_section_on_routing_and_nothing_else(tmp_path: Path) -> None:
    before = card(tmp_path, CONFIG)
    calibration = {
        "target_experts_per_token": 3.0,
        "data": "news.jsonl",
        "tokens": 12345,
        "mean_experts_per_token": 3.01,
    }
    update_routing(tmp_path, CONFIG | {"threshold": 0.5, "calibration": calibration})
    after = (tmp_path / CARD).read_text()
    assert "| threshold | 0.5 |" in after and "| threshold | 0.25 |" not in after
    assert "a token of news.jsonl uses 3.010 experts on average (over 12,345 tokens" in after
    start, end = "## Routing", "## Citation"
    assert after[: after.index(start)] == before[: before.index(start)]
    assert after[after.index(end) :] == before[before.index(end) :]
    update_routing(tmp_path, CONFIG)
    assert (tmp_path / CARD).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == [CARD]


def test_a_card_that_someone_wrote_stays(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("mine")
    update_routing(tmp_path, CONFIG)
    assert (tmp_path / CARD).read_text() == "mine"


def test_paths_of_the_cluster_do_not_get_into_the_card() -> None:
    args = Namespace(
        data_path=["0.3", "/secret/cluster/book_text_document", "0.7", "/secret/code"],
        consumed_train_samples=10,
        seq_length=128,
    )
    about = about_training(args, 7)
    assert about["data"] == "book_text_document, code"
    assert about["tokens"] == 1280 and about["steps"] == 7
