"""Text as windows: what belongs together, where it is cut, and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dynmoe.analysis.counting.windows import (
    MAX_GROUPS,
    OTHER,
    Reading,
    TextFile,
    Window,
    check_text,
    in_blocks,
    name_groups,
    read_windows,
)
from megatron_dynmoe.data.text.records import Limits

BY_SOURCE = Reading(source_key="source")


def read(tokenizer: Any, *files: TextFile, length: int = 16, **settings: Any) -> list[Window]:
    return list(read_windows(files, tokenizer, length, **settings))


def test_documents_are_packed_and_nothing_is_lost(
    loaded: tuple[Any, Any], texts: dict[str, Path]
) -> None:
    tokenizer = loaded[1]
    windows = read(tokenizer, TextFile(texts["prose"], "prose"))
    expected: list[int] = []
    documents: list[int] = []
    for number, line in enumerate(texts["prose"].read_text().splitlines()):
        text = json.loads(line)["text"]
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        documents += [number] * (len(expected) - len(documents))
    assert [token for window in windows for token in window.tokens] == expected
    assert [number for window in windows for number in window.documents] == documents
    assert {len(window.tokens) for window in windows[:-1]} == {16}
    assert [window.number for window in windows] == list(range(len(windows)))


def test_separate_documents_share_no_window(
    loaded: tuple[Any, Any], texts: dict[str, Path]
) -> None:
    windows = read(loaded[1], TextFile(texts["prose"], "prose"), length=1000, separate=True)
    assert len(windows) == 39
    assert all(2 not in window.tokens for window in windows)
    assert [set(window.documents) for window in windows] == [{i} for i in range(39)]
    assert all(len(window.documents) == len(window.tokens) for window in windows)


def test_a_field_can_name_the_groups(loaded: tuple[Any, Any], texts: dict[str, Path]) -> None:
    windows = read(loaded[1], TextFile(texts["prose"], None), reading=BY_SOURCE)
    assert {window.group for window in windows} == {"s0", "s1"}


def test_more_groups_than_memory_is_for_are_counted_together(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    path = tmp_path / "many.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i in range(MAX_GROUPS + 5):
            file.write(json.dumps({"text": "a house", "source": f"s{i}"}) + "\n")
    windows = read(loaded[1], TextFile(path, None), reading=BY_SOURCE, separate=True)
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
    monkeypatch.setattr("megatron_dynmoe.data.text.readers.TXT_PIECE", 200)
    seen: list[int] = []
    pieces = read(loaded[1], file, on_read=seen.append)
    tokens = [sum(len(window.tokens) for window in windows) for windows in (whole, pieces)]
    assert 0 < tokens[1] - tokens[0] < 30  # an end of text for each piece
    assert sum(seen) == texts["figures"].stat().st_size


class Counting:
    """A tokenizer that notes how much text it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.letters = tokenizer, 0
        self.eos_token_id = tokenizer.eos_token_id

    def __call__(self, text: str, **settings: Any) -> Any:
        self.letters += len(text)
        return self.tokenizer(text, **settings)


@pytest.mark.parametrize("sentence", ["the house of a man is cold. ", "abcdefghijklmnopqrstuvwxyz"])
def test_a_long_line_is_cut_before_it_is_encoded(
    loaded: tuple[Any, Any], tmp_path: Path, sentence: str
) -> None:
    text = sentence * 10_000
    (tmp_path / "line.txt").write_text(text)
    tokenizer = Counting(loaded[1])
    windows = read(tokenizer, TextFile(tmp_path / "line.txt", "line"), limit=100)
    whole = loaded[1](text[:5000], add_special_tokens=False)["input_ids"]
    assert [token for window in windows for token in window.tokens] == whole[:100]
    assert tokenizer.letters < 5000


def test_plain_text_without_lines_is_cut_at_words(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_dynmoe.data.text.readers.TXT_PIECE", 50)
    monkeypatch.setattr("io.DEFAULT_BUFFER_SIZE", 16)
    for text in ("a house of stone " * 20, "x" * 120, "short", "line one\n" * 20):
        (tmp_path / "a.txt").write_text(text)
        windows = read(loaded[1], TextFile(tmp_path / "a.txt", "a"), length=1000, separate=True)
        pieces = [loaded[1].decode(window.tokens) for window in windows]
        assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
        assert all(len(piece) <= 50 for piece in pieces)
        assert not any(piece.endswith("hous") for piece in pieces)


def test_blocks_keep_order_and_size() -> None:
    windows = [
        Window("a", i, [1] * length, [0] * length)
        for i, length in enumerate((8, 8, 3, 16, 2, 40, 1))
    ]
    blocks = list(in_blocks(windows, 32))
    assert [window for block in blocks for window in block] == windows
    assert [len(block) for block in blocks] == [3, 2, 1, 1]


def test_what_is_read_together_is_of_one_group_whatever_else_is_read() -> None:
    lengths = {"a": (8, 8, 3, 16), "b": (16, 16, 5), "c": (1,)}
    windows = {
        group: [Window(group, i, [1] * length, [0] * length) for i, length in enumerate(several)]
        for group, several in lengths.items()
    }
    mixed = [*windows["a"][:2], *windows["b"], *windows["c"], *windows["a"][2:]]
    blocks = list(in_blocks(mixed, 32))
    for group, alone in windows.items():
        assert [block for block in blocks if block[0].group == group] == list(in_blocks(alone, 32))


@pytest.mark.parametrize(
    ("content", "name", "settings", "message"),
    [
        ("", "a.txt", {}, "holds no text"),
        ('{"text": ""}\n', "a.jsonl", {}, "holds no text"),
        (
            '{"text": "%s"}\n' % ("x" * 99),
            "a.jsonl",
            {"limits": Limits(50)},
            "longer than 50 bytes",
        ),
        ('{"body": "x"}\n', "a.jsonl", {}, "--json-keys"),
        ('{"text": "x"}\n', "a.jsonl", {"source_key": "source"}, "--source-key"),
        ("x", "a.txt", {"source_key": "source"}, "plain text"),
        ("{", "a.jsonl", {}, "line 1.*--on-error skip"),
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
        check_text([TextFile(path, "a")], Reading(**settings))


def test_bad_records_can_be_left_out(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a house"}\n{\n{"text": 5}\n{"text": "a man"}\n')
    skipped: list[Any] = []
    reading = Reading(on_unreadable=skipped.append)
    windows = read(loaded[1], TextFile(path, "a"), reading=reading, separate=True)
    assert len(windows) == 2 and len(skipped) == 2
    with pytest.raises(ValueError, match=r"line 2.*--on-error skip"):
        read(loaded[1], TextFile(path, "a"))


def test_names_of_groups(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths = [tmp_path / "one.jsonl.gz", tmp_path / "b" / "one.txt"]
    for path in paths:
        path.touch()
    one, two = map(str, paths)
    assert [file.group for file in name_groups([one], [("two", two)])] == ["one", "two"]
    globbed = name_groups([f"{tmp_path}/*.gz"], [("b", f"{tmp_path}/*/*.txt")])
    assert globbed == [TextFile(paths[0], "one"), TextFile(paths[1], "b")]
    # The files of a folder, too, are a group each, or all of a group with a name.
    files = [file.group for file in name_groups([str(tmp_path)], [])]
    assert files == ["b/one", f"{tmp_path.name}/one"]
    (tmp_path / "b" / "two.txt").touch()
    named = name_groups([], [("all", str(tmp_path))])
    assert [(file.path.name, file.group) for file in named] == [
        ("one.txt", "all"),
        ("two.txt", "all"),
        ("one.jsonl.gz", "all"),
    ]
    for data, message in (
        ([f"{tmp_path}/none.txt"], "no such file"),
        ([one, one], "named twice"),
    ):
        with pytest.raises(ValueError, match=message):
            name_groups(data, [])


def test_names_do_not_matter_where_a_field_has_them(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "one.jsonl" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    files = name_groups([str(path) for path in paths], [], source_key="source")
    assert files == [TextFile(path, None) for path in paths]


def test_text_is_counted_once(tmp_path: Path) -> None:
    path, link = tmp_path / "one.txt", tmp_path / "link.txt"
    path.touch()
    link.symlink_to(path)
    for data, named in (
        ([str(path)], [("again", str(path))]),
        ([], [("a", str(path)), ("a", str(path))]),
        ([str(path), str(link)], []),
    ):
        with pytest.raises(ValueError, match=r"one\.txt.*would count twice"):
            name_groups(data, named)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["wiki.en.jsonl", "wiki.de.jsonl.gz"], ["wiki.de", "wiki.en"]),
        (["a/x.txt", "b/x.txt", "b/y.txt"], ["a/x", "b/x", "y"]),
        (["a/c/x.jsonl", "b/c/x.jsonl"], ["a/c/x", "b/c/x"]),
        (["x.txt", "x.jsonl"], ["x.jsonl", "x.txt"]),
        (["my notes v1.2.txt", ".txt"], [".txt", "my notes v1.2"]),
    ],
)
def test_groups_have_names_of_their_own(tmp_path, files, names):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("text")
    found = name_groups([str(tmp_path / file) for file in files], [])
    assert sorted(file.group for file in found) == names
