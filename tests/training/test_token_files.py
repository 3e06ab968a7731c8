"""Token files that are damaged or of another vocabulary: refused with file, place and remedy."""

import re
import struct
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_dynmoe.data.indexed import IndexedDatasetWriter

pytestmark = pytest.mark.megatron

NUM_EMBEDDINGS = 100
DOCUMENTS = [[1, 2, 3, 0], [], [4, 5, 99, 0], [6] * 70 + [0]]


def write(prefix: Path, documents: list[list[int]], dtype=np.int32) -> str:
    writer = IndexedDatasetWriter(prefix, np.dtype(dtype))
    tokens = np.concatenate([np.array(document, dtype) for document in documents])
    writer.add(tokens, np.array([len(document) for document in documents], np.int32))
    writer.close()
    writer.publish()
    return str(prefix)


def check(*data_path: str, **changes) -> None:
    from megatron_dynmoe.training.datasets.token_files import check_token_files

    paths = ("data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    names = dict.fromkeys((*paths, "per_split_data_args_path"))
    args = {"data_path": list(data_path), "padded_vocab_size": NUM_EMBEDDINGS, "mock_data": False}
    # What is in which split: tests/training/test_splits.py
    args |= {"split": "1,0,0", "eval_iters": 0, "full_validation": False, "skip_train": False}
    args |= {"train_iters": 1, "train_samples": None, "global_batch_size": 1, "seq_length": 8}
    args |= {"seed": 1, "finetune": False, "load": None}
    check_token_files(Namespace(**names | args | changes))


def test_files_that_fit(tmp_path):
    good = write(tmp_path / "good", DOCUMENTS)
    check(good)
    check("0.5", good, "0.5", write(tmp_path / "other", DOCUMENTS))
    check("s3://bucket/is-left-to-upstream")
    check(mock_data=True, data_path=None)
    check(data_path=None, train_data_path=[good], valid_data_path=[good])


PATHS = {
    "train_data_path": ["{gone}"],
    "valid_data_path": ["1", "{good}", "1", "{gone}"],
    "data_args_path": "1 {good} 1 {gone}",
    "per_split_data_args_path": '{{"train": ["{good}"], "valid": "1 {gone}", "test": null}}',
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_file_that_is_not_there_is_named_with_its_flag(tmp_path, monkeypatch, rank, name):
    monkeypatch.setenv("LOCAL_RANK", rank)
    good, gone = write(tmp_path / "good", DOCUMENTS), str(tmp_path / "gone")
    value = PATHS[name]
    if isinstance(value, str):
        value = written(tmp_path / "list", value.format(good=good, gone=gone))
    else:
        value = [word.format(good=good, gone=gone) for word in value]
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"^{flag}: {gone}: there is no gone.idx. Remedy: "):
        check(data_path=None, **{name: value})


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("data_args_path", None, "no such file or directory: .*list"),
        ("data_args_path", "a b 1 c", "some prefixes have a weight"),
        ("per_split_data_args_path", None, "no such file or directory: .*list"),
        ("per_split_data_args_path", "1 a", "Extra data"),
        ("per_split_data_args_path", '{"train": "a"}', "'valid'"),
        ("per_split_data_args_path", '["a"]', "list indices"),
    ],
)
def test_a_list_of_data_that_cannot_be_read(tmp_path, name, text, reason):
    path = str(tmp_path / "list")
    if text is not None:
        written(tmp_path / "list", text)
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"^{flag}: the list .*\({reason}.*\)\. Remedy: "):
        check(data_path=None, **{name: path})


def test_what_is_in_the_files_is_looked_at_once_a_node(tmp_path, monkeypatch):
    path = write(tmp_path / "foreign", [*DOCUMENTS, [NUM_EMBEDDINGS, 0]])
    monkeypatch.setenv("LOCAL_RANK", "1")
    check(path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="foreign"):
        check(path)


def test_a_run_without_data_is_refused():
    with pytest.raises(ValueError, match=r"^--data-path is not given: .* --mock-data"):
        check(data_path=None)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


LENGTHS, OFFSETS, BOUNDS = 34, 34 + 3 * 4, 34 + 3 * 12  # of the three sequences
DAMAGE = {
    "no index": (lambda p: p.with_suffix(".idx").unlink(), "there is no good.idx"),
    "no tokens": (lambda p: p.with_suffix(".bin").unlink(), "there is no good.bin"),
    "empty index": (lambda p: cut(p.with_suffix(".idx"), 0), "is no index"),
    "short index": (lambda p: cut(p.with_suffix(".idx"), 60), "has 60 bytes and should have"),
    "short tokens": (lambda p: cut(p.with_suffix(".bin"), 8), "has 8 bytes, but"),
    "magic": (lambda p: overwrite(p.with_suffix(".idx"), 0, b"PK"), "is no index"),
    "version": (lambda p: overwrite(p.with_suffix(".idx"), 9, b"\2"), "version 2"),
    "token type": (lambda p: overwrite(p.with_suffix(".idx"), 17, b"\x63"), "token type 99"),
    "count": (
        lambda p: overwrite(p.with_suffix(".idx"), 18, struct.pack("<Q", 2**62)),
        "and should have",
    ),
    "negative length": (
        lambda p: overwrite(p.with_suffix(".idx"), LENGTHS, struct.pack("<3i", -4, 12, 71)),
        "is damaged",
    ),
    "offset beyond the end": (
        lambda p: overwrite(p.with_suffix(".idx"), OFFSETS + 16, struct.pack("<q", 2**40)),
        "is damaged",
    ),
    "bounds before the start": (
        lambda p: overwrite(p.with_suffix(".idx"), BOUNDS, struct.pack("<q", -5)),
        "is damaged",
    ),
    "bounds beyond the end": (
        lambda p: overwrite(p.with_suffix(".idx"), BOUNDS + 8, struct.pack("<q", 9)),
        "is damaged",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_an_index_that_does_not_fit(tmp_path, how):
    good, bad = write(tmp_path / "sound", DOCUMENTS), tmp_path / "good"
    write(bad, DOCUMENTS)
    damage, says = DAMAGE[how]
    damage(bad)
    with pytest.raises(ValueError, match=f"^--data-path: .*{says}.* Remedy: "):
        check(good, str(bad))


@pytest.mark.parametrize("wrong", (100, 2**31 - 1, -1))
def test_an_id_that_has_no_embedding_is_found_at_start_up(tmp_path, wrong):
    path = write(tmp_path / "foreign", [*DOCUMENTS, [7, 7, wrong, 0]])
    with pytest.raises(ValueError, match=r"foreign: .*\(first in document 4, token 2\).*tokenizer"):
        check(path)


@pytest.mark.parametrize("flag", ("reset_attention_mask", "reset_position_ids", "eod_mask_loss"))
def test_documents_without_an_end_cannot_be_told_apart(tmp_path, monkeypatch, flag):
    from megatron_dynmoe.training.datasets import token_files

    monkeypatch.setattr(token_files, "build_tokenizer", lambda args: SimpleNamespace(eod=0))
    check(write(tmp_path / "ended", DOCUMENTS), **{flag: True})
    path = write(tmp_path / "joined", [document[:-1] for document in DOCUMENTS if document])
    check(path)
    message = f"^--{flag.replace('_', '-')} is given, .* id 0. --data-path: .*joined.* --append-eod"
    with pytest.raises(ValueError, match=message):
        check(path, **{flag: True})


def test_an_index_is_compared_in_blocks(tmp_path, monkeypatch):
    from megatron_dynmoe.data import check as data_check

    monkeypatch.setattr(data_check, "SEQUENCES_AT_ONCE", 2)
    documents = [[1] * length for length in (3, 1, 4, 1, 5, 9, 2)]
    path = Path(write(tmp_path / "many", documents))
    check(str(path))
    for sequence in range(7):
        offset = 34 + 7 * 4 + 8 * sequence
        kept = path.with_suffix(".idx").read_bytes()
        overwrite(path.with_suffix(".idx"), offset, struct.pack("<q", 1000))
        with pytest.raises(ValueError, match="is damaged"):
            check(str(path))
        path.with_suffix(".idx").write_bytes(kept)


def dataset(prefix: str, num_embeddings: int = NUM_EMBEDDINGS):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from megatron_dynmoe.training.datasets.token_files import DatasetConfig, GPTDataset

    config = DatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend=([prefix], None),
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        mid_level_dataset_surplus=0.005,
        tokenizer=SimpleNamespace(
            eod=0, pad=0, vocab_size=100, unique_identifiers={"class": "none"}
        ),
        num_embeddings=num_embeddings,
    )
    low_level = IndexedDataset(prefix)
    sequences = np.arange(len(low_level), dtype=np.int32)
    return GPTDataset(low_level, prefix, sequences, None, Split.train, config)


@pytest.mark.parametrize("wrong", (100, -1))
def test_an_id_that_has_no_embedding_is_found_where_it_is_read(tmp_path, wrong):
    """Deep in a large file, where the look at start-up did not reach."""
    sound = dataset(write(tmp_path / "sound", DOCUMENTS))
    assert sum(len(sound[i]["tokens"]) for i in range(len(sound))) == 8 * len(sound) > 60

    foreign = dataset(write(tmp_path / "foreign", [*DOCUMENTS, [8] * 20 + [wrong, 9, 0]]))
    message = f"foreign: document 4, token 20 is the id {wrong}, .* ids to 99. Remedy: "
    errors = []
    for i in range(len(foreign)):
        try:
            foreign[i]
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) in (1, 2)  # as a token, and as the label of the one before it
    assert all(re.search(message, error) for error in errors)


def test_the_cache_is_upstreams(tmp_path):
    from megatron.core.datasets import gpt_dataset

    from megatron_dynmoe.training.datasets.token_files import GPTDataset

    assert GPTDataset.__name__ == gpt_dataset.GPTDataset.__name__


@pytest.mark.parametrize("has_path", [True, False], ids=["--data-cache-path", "default"])
def test_an_index_that_a_killed_run_left_half_written_is_named(tmp_path, has_path):
    from megatron_dynmoe.training.datasets.token_files import naming_the_cache

    prefix = tmp_path / "good"
    folder = tmp_path / "cache" if has_path else prefix / "cache" / "GPTDataset_indices"
    folder.mkdir(parents=True)
    names = ("data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    args = Namespace(
        **dict.fromkeys((*names, "per_split_data_args_path")),
        data_path=[str(prefix)],
        data_cache_path=str(folder) if has_path else None,
        mock_data=False,
    )
    for name in ("a.npy", "b.npy", "c.npy"):
        np.save(folder / name, np.arange(100))
    with pytest.raises(ValueError, match=r"^something else$"), naming_the_cache(args):
        raise ValueError("something else")
    cut(folder / "b.npy", 200)
    with pytest.raises(ValueError, match=r"b\.npy is cut short .*Remedy"), naming_the_cache(args):
        np.load(folder / "b.npy", mmap_mode="r")
    cut(folder / "c.npy", 0)
    with pytest.raises(ValueError, match=r"b\.npy and 1 more"), naming_the_cache(args):
        np.load(folder / "c.npy", mmap_mode="r")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("a cache", "^--data-cache-path is a cache, .* cannot be written there "),
        (None, "^--data-cache-path is not given, .* cannot be written beside the tokens "),
    ],
)
def test_a_cache_that_cannot_be_written_is_named(tmp_path, path, says):
    from megatron_dynmoe.training.datasets.token_files import naming_the_cache

    with (
        pytest.raises(ValueError, match=says + r"\(is a directory: .*: give a folder"),
        naming_the_cache(Namespace(data_cache_path=path)),
    ):
        try:
            tmp_path.write_text("")
        except OSError as error:
            raise Exception("upstream's words") from error
