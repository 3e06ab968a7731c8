"""A run that goes on with other data: what is said, and what is none of it."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_splits import check, write

pytestmark = pytest.mark.megatron


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Start a run that loads what the one before has left; gives what it says."""
    from megatron_dynmoe.training.datasets import data_order

    left: list[Namespace] = []
    monkeypatch.setattr(data_order, "saved_arguments", lambda args: left[-1] if left else None)
    monkeypatch.setenv("RANK", "0")

    def started(**changes: Any) -> str:
        left.append(check(**{"split": "1,0,0", "eval_iters": 0, "load": "there"} | changes))
        return capsys.readouterr().out

    return started


def test_the_same_data_elsewhere_are_the_same(start: Any, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    one, moved = (write(tmp_path / name, [9] * 300) for name in ("a", "moved/b"))
    assert start(data_path=[one]) == ""
    assert start(data_path=[moved]) == ""
    assert start(data_path=[one], train_iters=20) == ""  # of text that is read once
    assert start(data_path=["1", one, "3", moved]).count("other training documents") == 1
    assert start(data_path=["10", one, "30", moved]) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_path": ["other"]}, "other training documents: it goes on from its position"),
        ({"split": "90,10,0"}, "other training documents"),
        ({"seed": 2}, "--seed 2 (it was 1)"),
        ({"seq_length": 4}, "--seq-length 4 (it was 8)"),
        ({"train_iters": 80}, "320 sequences to read (it was 40) of a text that is read more than"),
        ({"seed": 2, "finetune": True}, ""),
        ({"seed": 2, "split": "0,100,0", "skip_train": True, "eval_iters": 1}, ""),
    ],
)
def test_what_changes_the_order_is_said(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data", [9] * 100)
    write(tmp_path / "other", [9] * 99 + [8, 1])
    assert start(data_path=["data"]) == ""
    out = start(**{"data_path": ["data"]} | changes)
    assert ("> warning: since the checkpoint in there" in out) == bool(said) and said in out


def test_other_weights_are_said(start: Any, tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, [9] * 100) for name in "ab")
    assert start(data_path=["1", one, "3", other]) == ""
    assert "other weights of its files" in start(data_path=["1", one, "1", other])
