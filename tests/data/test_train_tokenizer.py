"""The trained model: its layout, that it loses nothing, that it is reproducible."""

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from megatron_dynmoe.cli import tokenizer as command
from megatron_dynmoe.data.train_tokenizer import train_tokenizer
from megatron_dynmoe.settings.messages.command_line import UsageError

from .conftest import CORPUS, ODD_TEXTS, write_jsonl


def test_layout_is_llamas(sp_model: Path) -> None:
    model = SentencePieceProcessor(model_file=str(sp_model))
    assert model.vocab_size() == 600
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert model.id_to_piece(3) == "<0x00>" and model.id_to_piece(258) == "<0xFF>"
    assert model.encode("2024", return_type=str) == list("2024")


def test_decoding_gives_back_the_text(sp_model: Path) -> None:
    model = SentencePieceProcessor(model_file=str(sp_model))
    for text in ODD_TEXTS:
        # SentencePiece's own sign for a space is read as one.
        assert model.decode(model.encode(text)) == text.replace("▁", " ")
    # And it puts no space before a text, unlike Llama's.
    assert model.encode("a", return_type=str) == ["a"]


def test_same_input_same_model(sp_model: Path, tmp_path: Path) -> None:
    again = train_tokenizer([str(CORPUS / "code.jsonl.gz")], str(tmp_path / "other name"), 600)
    assert again.read_bytes() == sp_model.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["other name.model"]


def test_too_little_text(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a few words"])
    with pytest.raises(UsageError, match=r"--vocab-size is 4096, which this text .* cannot give"):
        train_tokenizer([str(source)], str(tmp_path / "out"), 4096)
    with pytest.raises(ValueError, match="no text in"):
        train_tokenizer([str(write_jsonl(source, [""]))], str(tmp_path / "out"), 4096)
    with pytest.raises(UsageError, match="--vocab-size is 259: give more than 259"):
        train_tokenizer([str(source)], str(tmp_path / "out"), 259)


def test_an_unreadable_line_is_named(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "words"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: not valid JSON"):
        train_tokenizer([str(source)], str(tmp_path / "out"), 300)


def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    texts = ["some words of text, more than a few, for a model of a few pieces"] * 50
    source.write_text("nonsense\n" + "".join(json.dumps({"text": t}) + "\n" for t in texts))
    argv = ["--input", str(source), "--vocab-size", "285", "--output", str(tmp_path / "m")]
    command.main([*argv, "--on-error", "skip"])
    captured = capfd.readouterr()
    assert "m.model (285 pieces)\nto use it: --tokenizer-type Sentence" in captured.out
    assert captured.err == ""  # the trainer's own log
    with pytest.raises(SystemExit) as exit_:
        command.main(argv)
    assert exit_.value.code == 2 and "m.model exists" in capfd.readouterr().err
