"""Splits without data, weights that are no weights, and text that is read many times."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from megatron_dynmoe.data.indexed import IndexedDatasetWriter

pytestmark = pytest.mark.megatron


def write(prefix: Path, lengths: list[int]) -> str:
    writer = IndexedDatasetWriter(prefix, np.dtype(np.int32))
    writer.add(np.ones(sum(lengths), np.int32), np.array(lengths, np.int32))
    writer.close()
    writer.publish()
    return str(prefix)


def check(**changes) -> None:
    from megatron_dynmoe.training.token_files import check_token_files

    names = ("data_path", "data_args_path", "train_data_path", "valid_data_path")
    args = dict.fromkeys((*names, "test_data_path", "per_split_data_args_path"))
    args |= {
        "padded_vocab_size": 100,
        "mock_data": False,
        "split": "95,5,0",
        "eval_iters": 10,
        "full_validation": False,
        "skip_train": False,
        "train_iters": 10,
        "train_samples": None,
        "global_batch_size": 4,
        "seq_length": 8,
    }
    check_token_files(Namespace(**args | changes))


@pytest.mark.parametrize("data", ["data_path", "data_args_path", "blend"])
@pytest.mark.parametrize(
    ("split", "lengths", "message"),
    [
        (
            "95,5,0",
            [9] * 3,
            r"--split is 95,5,0: validation gets 5 % of the 3 documents with text of \S+a, ",
        ),
        ("969, 30, 1", [9] * 20, r"--split is 969,30,1 \(Megatron's default\): test gets 0.1 % of"),
        ("1,99,0", [9] * 3, "training gets 1 % of the 3 documents"),
        ("1,1,0", [9, 0, 0, 0], "training gets 50 % of the 1 document with text"),
    ],
)
def test_a_split_without_a_token_is_refused(tmp_path, data, split, lengths, message):
    prefix = write(tmp_path / "a", lengths)
    flags = {data: [prefix]}
    if data == "blend":
        flags = {"data_path": ["1", write(tmp_path / "b", [9] * 2000), "1", prefix]}
    if data == "data_args_path":
        (tmp_path / "list").write_text(prefix)
        flags = {data: str(tmp_path / "list")}
    with pytest.raises(ValueError, match=message) as refused:
        check(split=split, **flags)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("split", ["95,5,0", "969, 30, 1"])
def test_a_split_that_is_not_read_may_be_empty(tmp_path, split):
    check(split=split, data_path=[write(tmp_path / "a", [9] * 3)], eval_iters=0)


def test_evaluation_without_validation_data_is_refused(tmp_path):
    prefix = write(tmp_path / "a", [9] * 30)
    with pytest.raises(ValueError, match=r"--split is 100,0,0.*--eval-iters 10.*--eval-iters 0"):
        check(split="100,0,0", data_path=[prefix])
    with pytest.raises(ValueError, match=r"--valid-data-path is not given.*--eval-iters 0"):
        check(train_data_path=[prefix])
    with pytest.raises(ValueError, match="--full-validation"):
        check(split="100,0,0", data_path=[prefix], full_validation=True, eval_iters=0)
    check(split="100,0,0", data_path=[prefix], eval_iters=0)
    check(train_data_path=[prefix], valid_data_path=[prefix])
    check(split="0,100,0", data_path=[prefix], skip_train=True)


@pytest.mark.parametrize("split", ["", "abc", "0,0,0", "1,2,3,4", "-1,2,0", "1,nan,0", None])
def test_a_split_that_is_none_is_refused(tmp_path, split):
    with pytest.raises(ValueError, match=r"^--split is .*--split 95,5,0"):
        check(split=split, data_path=[write(tmp_path / "a", [9] * 30)])


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "0.0"])
def test_a_weight_that_is_not_above_0_is_refused(tmp_path, weight):
    one, other = (write(tmp_path / name, [9] * 30) for name in "ab")
    with pytest.raises(ValueError, match=rf"^--data-path gives {other} the weight .*above 0"):
        check(data_path=["1", one, weight, other])
    with pytest.raises(ValueError, match=r"^--valid-data-path gives"):
        check(train_data_path=[one], valid_data_path=[weight, one, "1", other])


def test_text_that_is_read_many_times_is_mentioned(tmp_path, capsys):
    one, other = write(tmp_path / "a", [10] * 100), write(tmp_path / "b", [10] * 1000)
    check(data_path=[one], split="80,20,0", train_iters=100)  # 3,200 of 800 tokens
    assert capsys.readouterr().out == ""
    check(data_path=[one], split="80,20,0", train_iters=200)
    assert f"read the same training text many times over: {one} (800 tokens) 8 times" in (
        capsys.readouterr().out.replace("reads", "read")
    )
    check(data_path=["3", one, "1", other], split="80,20,0", train_iters=200)
    out = capsys.readouterr().out
    assert f"{one} (800 tokens) 6 times" in out and other not in out
