"""A run that goes on with another tokenizer than it began with says so."""

from argparse import Namespace

import pytest

from megatron_dynmoe.checkpoints.settings import tell_other_tokenizer

pytestmark = pytest.mark.megatron


def run(model, kind="SentencePieceTokenizer", rank=0):
    return Namespace(tokenizer_type=kind, tokenizer_model=str(model), load="ckpt", rank=rank)


@pytest.fixture
def told(tmp_path, capsys):
    for name, content in {"old": b"1", "moved": b"1", "other": b"2"}.items():
        (tmp_path / f"{name}.model").write_bytes(content)

    def told(here, there="old", **settings):
        tell_other_tokenizer(
            run(tmp_path / f"{here}.model", **settings), run(tmp_path / f"{there}.model")
        )
        return capsys.readouterr().out

    return told


def test_another_file_is_told(told, tmp_path):
    said = told("other")
    assert said.startswith("> note: the tokenizer is SentencePieceTokenizer")
    assert f"the run in ckpt had SentencePieceTokenizer {tmp_path / 'old.model'}" in said
    assert told("old", there="gone")  # which may be another


def test_the_same_pieces_are_not_told(told):
    assert not told("old")
    assert not told("moved")
    assert not told("other", rank=1)  # one rank says it


def test_runs_without_a_file_are_not_told(capsys):
    null = Namespace(tokenizer_type="NullTokenizer", tokenizer_model=None, load="ckpt", rank=0)
    tell_other_tokenizer(null, Namespace())
    tell_other_tokenizer(run("a.model"), Namespace())
    assert not capsys.readouterr().out
