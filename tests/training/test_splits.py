"""Splits without data, weights that are no weights, and text that is read many times."""

import re
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


def check(**changes) -> Namespace:
    """Look at the data of a run with these changes of its arguments; gives them as they end up."""
    from megatron_dynmoe.training.datasets.token_files import check_token_files

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
        "seed": 1,
        "finetune": False,
        "load": None,
    }
    namespace = Namespace(**args | changes)
    check_token_files(namespace)
    return namespace


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


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["{a}", "0.3", "{b}", "0.7"], r"--data-path 0\.3 {a} 0\.7 {b}\.$"),
        (["{a}", "0.3", "{b}"], r"--data-path 1 FILE 1 FILE\.$"),
        (["0.3", "{a}", "{b}"], r"--data-path 1 FILE 1 FILE\.$"),
    ],
)
def test_a_weight_after_its_file_is_refused(tmp_path, words, remedy):
    names = {name: write(tmp_path / name, [9] * 30) for name in "ab"}
    given = [word.format(**names) for word in words]
    with pytest.raises(ValueError, match=r"^--data-path has 0\.3 in the place") as refused:
        check(data_path=given)
    assert re.search(remedy.format(**names), str(refused.value))


def test_a_number_may_be_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "2024", [9] * 30)
    check(data_path=["2024"])


def test_full_validation_takes_no_weights_and_no_test_data(tmp_path):
    one, other = (write(tmp_path / name, [9] * 30) for name in "ab")
    full = {"full_validation": True}
    valid = {"train_data_path": ["1", one, "2", other], "valid_data_path": [one, other]}
    check(**full, **valid)
    with pytest.raises(ValueError, match=r"^--valid-data-path gives weights.*--full-validation"):
        check(**full, **valid | {"valid_data_path": ["1", one, "2", other]})
    with pytest.raises(ValueError, match=r"^--data-path gives weights, but with --full-validation"):
        check(**full, data_path=["1", one, "2", other], split="80,20,0")
    with pytest.raises(ValueError, match=r"^--test-data-path gives test data.*: leave it out"):
        check(**full, **valid, test_data_path=[one])
    with pytest.raises(ValueError, match=r"^--split is 80,10,10, with test data.*--split 95,5,0"):
        check(**full, data_path=[one], split="80,10,10")


def test_a_file_of_less_than_a_sequence_is_refused_where_it_is_read_once(tmp_path):
    long, short = write(tmp_path / "a", [9] * 30), write(tmp_path / "b", [8])
    message = rf"^{short} has 8 tokens for training, .* takes 9 \(--seq-length is 8,.*files weights"
    with pytest.raises(ValueError, match=message):
        check(train_data_path=[long, short], valid_data_path=[long])
    check(train_data_path=["1", long, "1", short], valid_data_path=[long])
    check(train_data_path=[short], valid_data_path=[short])  # read as often as needed
    for valid in ([short], [long, short]):
        with pytest.raises(ValueError, match=r"8 tokens for validation.*read once"):
            check(train_data_path=[long], valid_data_path=valid, full_validation=True)
    check(train_data_path=[long, write(tmp_path / "c", [9])], valid_data_path=[long])


def test_an_empty_split_of_a_stock_script_ends_instead_of_counting_for_ever(tmp_path):
    """What pretrain_gpt.py does, which knows of no check of ours."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from megatron_dynmoe.upstream import patches

    patches.install()
    prefix = write(tmp_path / "a", [9] * 3)
    settings = {"random_seed": 1, "sequence_length": 8, "tokenizer": Tokenizer()}
    settings |= dict.fromkeys(
        ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False
    )
    config = GPTDatasetConfig(**settings, blend=([prefix], None), split="969,30,1")
    message = (
        rf"^--split is 969,30,1: validation gets none of the 3 documents with text of {prefix}"
    )
    with pytest.raises(ValueError, match=message):
        BlendedMegatronDatasetBuilder(GPTDataset, [4, 0, 0], lambda: True, config).build()


class Tokenizer:
    """As much of one as Megatron's datasets ask for."""

    eod, vocab_size, unique_identifiers = 0, 100, {"name": "of this test"}
