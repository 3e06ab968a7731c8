"""The cache of data indexes: right after the tokens were written again, and still of use."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_dynmoe.data.indexed import IndexedDatasetWriter

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module", autouse=True)
def _patched():
    from megatron_dynmoe.upstream import patches

    patches.install()


def write(prefix: Path, lengths: list[int], seed: int = 0) -> str:
    """Documents of random tokens, under the same path as often as asked."""
    random = np.random.RandomState(seed)
    for ending in (".bin", ".idx"):
        Path(str(prefix) + ending).unlink(missing_ok=True)
    writer = IndexedDatasetWriter(prefix, np.dtype(np.int32))
    writer.add(random.randint(1, 100, sum(lengths)).astype(np.int32), np.array(lengths, np.int32))
    writer.close()
    writer.publish()
    return str(prefix)


def build(blend, cache: Path | None, split: str | None = "60,30,10", per_split=None):
    """All three splits, as training builds them; per split, the tokens of every sample."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    from megatron_dynmoe.training.datasets.token_files import DatasetConfig, GPTDataset

    tokenizer = SimpleNamespace(eod=0, pad=0, vocab_size=100, unique_identifiers={"class": "none"})
    config = DatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend=blend,
        blend_per_split=per_split,
        split=split,
        path_to_cache=str(cache) if cache else None,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        mid_level_dataset_surplus=0.005,
        tokenizer=tokenizer,
        num_embeddings=100,
    )
    built = BlendedMegatronDatasetBuilder(GPTDataset, [40, 9, 5], lambda: True, config).build()
    return [[sample["tokens"].tolist() for sample in part] for part in built if part is not None]


def one(folder: Path) -> dict:
    return {"blend": ([str(folder / "a")], None)}


def weighted(folder: Path) -> dict:
    return {"blend": ([str(folder / "a"), str(folder / "b")], [1.0, 2.0])}


def per_split(folder: Path) -> dict:
    paths = ([str(folder / "a")], None), ([str(folder / "b")], None), None
    return {"blend": None, "split": None, "per_split": list(paths)}


GROWN, SHRUNK = [9] * 40, [9] * 11
EDITED = [5, 13] * 10  # as many documents and tokens as before, other lengths
MOVED = [9] * 19 + [10, 8]


@pytest.mark.parametrize("layout", [one, weighted, per_split])
@pytest.mark.parametrize("has_path", [True, False], ids=["--data-cache-path", "default"])
@pytest.mark.parametrize("lengths", [GROWN, SHRUNK, EDITED, MOVED])
def test_tokens_that_were_written_again_are_read_as_with_an_empty_cache(
    tmp_path, layout, has_path, lengths
):
    cache = tmp_path / "cache" if has_path else None
    write(tmp_path / "a", [9] * 20)
    write(tmp_path / "b", [11] * 20)
    build(**layout(tmp_path), cache=cache)
    write(tmp_path / "a", lengths, seed=1)
    assert build(**layout(tmp_path), cache=cache) == build(
        **layout(tmp_path), cache=tmp_path / "fresh"
    )


@pytest.mark.parametrize("layout", [one, weighted])
def test_a_cache_that_fits_is_used(tmp_path, layout):
    for name in "ab":
        write(tmp_path / name, [9] * 20)
    first = build(**layout(tmp_path), cache=tmp_path / "cache")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    for name in "ab":  # other tokens, of the same lengths, written at another time
        write(tmp_path / name, [9] * 20, seed=1)
    second = build(**layout(tmp_path), cache=tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == files
    assert first != second  # and the new tokens are those that are read
    assert second == build(**layout(tmp_path), cache=tmp_path / "fresh")


def test_the_name_of_an_index_depends_on_nothing_but_path_and_content(tmp_path):
    names = []
    for _ in range(2):
        write(tmp_path / "a", [9] * 20)
        os.utime(f"{tmp_path / 'a'}.idx", (1, 1))
        cache = tmp_path / f"cache{len(names)}"
        build(**one(tmp_path), cache=cache)
        names.append(sorted(path.name for path in cache.iterdir()))
    assert names[0] == names[1]


def test_nobody_sees_an_index_that_is_being_written(tmp_path, monkeypatch):
    """While one job writes the last file, another one starts: it finds none, and builds its own."""
    write(tmp_path / "a", [9] * 20)
    expected = build(**one(tmp_path), cache=tmp_path / "fresh")
    save, waiting, go = np.save, threading.Event(), threading.Event()

    def slow_save(path, *args, **kwargs):
        save(path, *args, **kwargs)
        if threading.current_thread() is writer and "sample_index" in str(path):
            waiting.set()
            assert go.wait(60)

    monkeypatch.setattr(np, "save", slow_save)
    seen = []
    settings = one(tmp_path) | {"cache": tmp_path / "cache"}
    writer = threading.Thread(target=lambda: seen.append(build(**settings)))
    writer.start()
    assert waiting.wait(60)
    assert not [*(tmp_path / "cache").glob("*.npy")]
    assert build(**settings) == expected
    go.set()
    writer.join()
    assert seen == [expected]
    assert not [*(tmp_path / "cache").glob(".new-*")]
