"""Text as windows: what belongs together, where it is cut, and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dynmoe.analysis.windows import (
    MAX_GROUPS,
    OTHER,
    TextFile,
    Window,
    in_blocks,
    name_groups,
    read_windows,
)


def read(tokenizer: Any, *files: TextFile, length: int = 16, **settings: Any) -> list[Window]:
    return list(read_windows(files, tokenizer, length, **settings))


def test_documents_are_packed_and_nothing_is_lost(
    loaded: tuple[Any, Any], texts: dict[str, Path]
) -> None:
    tokenizer = loaded[1]
    windows = read(tokenizer, TextFile(texts["prose"], "prose"))
    expected: list[int] = []
    for line in texts["prose"].read_text().splitlines():
        text = json.loads(line)["text"]
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    assert [token for window in windows for token in window.tokens] == expected
    assert {len(window.tokens) for window in windows[:-1]} == {16}
    assert [window.number for window in windows] == list(range(len(windows)))


def test_separate_documents_share_no_window(
    loaded: tuple[Any, Any], texts: dict[str, Path]
) -> None:
    windows = read(loaded[1], TextFile(texts["prose"], "prose"), length=1000, separate=True)
    assert len(windows) == 39
    assert all(2 not in window.tokens for window in windows)


def test_a_field_can_name_the_groups(loaded: tuple[Any, Any], texts: dict[str, Path]) -> None:
    windows = read(loaded[1], TextFile(texts["prose"], None), source_key="source")
    assert {window.group for window in windows} == {"s0", "s1"}


def test_more_groups_than_memory_is_for_are_counted_together(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    path = tmp_path / "many.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i in range(MAX_GROUPS + 5):
            file.write(json.dumps({"text": "a house", "source": f"s{i}"}) + "\n")
    windows = read(loaded[1], TextFile(path, None), source_key="source", separate=True)
    groups = [window.group for window in windows]
    assert len(set(groups)) == MAX_GROUPS + 1
    assert groups.count(OTHER) == 5


def test_a_limit_holds_for_each_group(loaded: tuple[Any, Any], texts: dict[str, Path]) -> None:
    files = [TextFile(texts[name], name) for name in texts]
    windows = read(loaded[1], *files, limit=100)
    for name in texts:
        assert sum(len(window.tokens) for window in windows if window.group == name) == 100


def test_long_plain_text_is_read_in_pieces(
    loaded: tuple[Any, Any], texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = TextFile(texts["figures"], "figures")
    whole = read(loaded[1], file)
    monkeypatch.setattr("megatron_dynmoe.analysis.windows.TXT_PIECE", 200)
    seen: list[int] = []
    pieces = read(loaded[1], file, on_read=seen.append)
    tokens = [sum(len(window.tokens) for window in windows) for windows in (whole, pieces)]
    assert 0 < tokens[1] - tokens[0] < 30  # an end of text for each piece
    assert sum(seen) == texts["figures"].stat().st_size


def test_blocks_keep_order_and_size() -> None:
    windows = [Window("a", i, [1] * length) for i, length in enumerate((8, 8, 3, 16, 2, 40, 1))]
    blocks = list(in_blocks(windows, 32))
    assert [window for block in blocks for window in block] == windows
    assert [len(block) for block in blocks] == [3, 2, 1, 1]


@pytest.mark.parametrize(
    ("content", "name", "settings", "message"),
    [
        ("", "a.txt", {}, "holds no text"),
        ('{"text": ""}\n', "a.jsonl", {}, "holds no text"),
        ('{"body": "x"}\n', "a.jsonl", {}, "--text-key"),
        ('{"text": "x"}\n', "a.jsonl", {"source_key": "source"}, "--source-key"),
        ("x", "a.txt", {"source_key": "source"}, "plain text"),
        ("{", "a.jsonl", {}, "line 1"),
        (b"\xff\xfe", "a.txt", {}, "not valid UTF-8"),
    ],
)
def test_bad_text_is_refused(
    loaded: tuple[Any, Any],
    tmp_path: Path,
    content: str | bytes,
    name: str,
    settings: dict[str, Any],
    message: str,
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read(loaded[1], TextFile(path, "a"), **settings)


def test_names_of_groups(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths = [tmp_path / "one.jsonl.gz", tmp_path / "b" / "one.txt"]
    for path in paths:
        path.touch()
    assert name_groups(paths[:1], [("two", paths[1])])[0].group == "one"
    with pytest.raises(ValueError, match="--group NAME=FILE"):
        name_groups(paths, [])
    with pytest.raises(ValueError, match="no such file"):
        name_groups([tmp_path / "none.txt"], [])
