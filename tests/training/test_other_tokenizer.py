"""A run that goes on with another tokenizer than it began with says so."""

from argparse import Namespace

import pytest

from megatron_dynmoe.checkpoints import saved_arguments as settings
from megatron_dynmoe.checkpoints.saved_arguments import agree_with_checkpoint

pytestmark = pytest.mark.megatron
SENTENCEPIECE = "SentencePieceTokenizer"


@pytest.fixture
def start(tmp_path, capsys, monkeypatch):
    """Starts a run, which goes on from another if that is given; returns its arguments and words.

    Of the run before only the tokenizer is known.
    """
    monkeypatch.setattr(settings, "_SIZES", ())
    monkeypatch.setattr(settings, "_keep_padded_vocabulary", lambda args, saved: None)
    monkeypatch.setattr(settings, "_check_schedule", lambda args, saved: None)

    def start(name, before=None, kind=SENTENCEPIECE, rank=0):
        monkeypatch.setattr(settings, "saved_arguments", lambda args: before)
        model = name and str(tmp_path / name)
        args = Namespace(tokenizer_type=kind, tokenizer_model=model, load="ckpt", rank=rank)
        rest = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler", "finetune")
        vars(args).update(dict.fromkeys((*rest, "no_load_optim", "skip_train")))
        agree_with_checkpoint(args)
        return args, capsys.readouterr().out

    for name, content in {"old.model": b"1", "moved.model": b"1", "other.model": b"2"}.items():
        (tmp_path / name).write_bytes(content)
    return start


def test_another_file_is_told(start, tmp_path):
    old, said = start("old.model")
    assert not said
    _, said = start("other.model", old)
    assert said.startswith(f"> note: the tokenizer is {SENTENCEPIECE} {tmp_path / 'other.model'}")
    assert f"the run in ckpt had {SENTENCEPIECE} {tmp_path / 'old.model'}: if" in said
    assert not start("other.model", old, rank=1)[1]  # one rank says it


def test_other_pieces_in_the_same_place_are_told(start, tmp_path):
    for file in ("old.model", "folder/tokenizer.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"1")
        name = file.partition("/")[0]
        old, _ = start(name)
        assert not start(name, old)[1]
        (tmp_path / file).write_bytes(b"3")
        assert f"{tmp_path / name} of other content: if they are not" in start(name, old)[1]


def test_the_same_pieces_are_not_told(start, tmp_path):
    old, _ = start("old.model")
    (tmp_path / "old.model").unlink()
    assert not start("moved.model", old)[1]


def test_what_is_not_known_is_told_by_its_name(start):
    old, _ = start("old.model")
    del old.dynmoe_tokenizer  # of a run before it was kept
    assert not start("old.model", old)[1]
    assert start("moved.model", old)[1]


def test_runs_without_a_file_are_not_told(start):
    null, _ = start(None, kind="NullTokenizer")
    assert not start(None, null, kind="NullTokenizer")[1]
    assert not start("old.model", null)[1]
    assert not start("old.model", Namespace())[1]
