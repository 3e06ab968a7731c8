"""Input that nobody meant: random bytes, bombs, lines without an end. Told by file and number."""

import bz2
import gzip
import io
import json
import lzma
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_dynmoe.data.text import readers, records
from megatron_dynmoe.data.text.readers import open_reader
from megatron_dynmoe.data.text.records import HARMLESS, Limits, Unreadable

from .conftest import Run

# What JSON may hold, and what stands where a text should.
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=9,
)
RECORDS = st.dictionaries(st.sampled_from(("text", "title", "\x1b[31m", "")), VALUES, max_size=3)
DUMPED = st.builds(
    lambda record, ascii: json.dumps(record, ensure_ascii=ascii).encode("utf-8", "surrogatepass"),
    st.one_of(RECORDS, VALUES, st.builds(lambda text: {"text": text}, st.text())),
    st.booleans(),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A record with some bytes cut out, doubled or changed."""
    line = bytearray(draw(DUMPED))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(line)))
        line[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=3))
    return bytes(line)


def one_line(line: bytes) -> bytes:
    return line.replace(b"\n", b"")


LINES = st.lists(st.one_of(DUMPED, damaged(), st.binary(max_size=40)).map(one_line), max_size=8)


def read(path: Path, limits: Limits) -> tuple[list[tuple[str, ...]], list[str]]:
    """The documents, and what is said of the other lines."""
    said: list[str] = []
    reader = open_reader(path, ["text"], lambda error: said.append(str(error)), limits)
    return list(reader), said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@settings(max_examples=150)
@given(lines=LINES, compressed=st.booleans(), longest=st.sampled_from((8, 60, 10**6)))
def test_every_line_is_a_document_or_told_of(
    lines: list[bytes], compressed: bool, longest: int, folder: Path
) -> None:
    path = folder / ("in.jsonl.gz" if compressed else "in.jsonl")
    data = b"".join(line + b"\n" for line in lines)
    assume(not data.startswith(tuple(readers.FOREIGN)))  # refused as a whole
    path.write_bytes(gzip.compress(data) if compressed else data)
    documents, said = read(path, Limits(line_bytes=longest))
    assert len(documents) + len(said) == len(lines)
    for (text,) in documents:
        text.encode("utf-8")  # never half of a surrogate pair
    for message in said:
        number = int(message.removeprefix(f"{path}, line ").split(":")[0])
        assert 1 <= number <= len(lines)
        assert len(message) < len(str(path)) + 250 and message.isprintable()
        if len(lines[number - 1]) + 1 > longest:
            assert "--max-line-bytes" in message


@settings(max_examples=100)
@given(data=st.binary(max_size=200), suffix=st.sampled_from((".gz", ".zst", ".parquet", "")))
def test_any_bytes_are_read_or_refused_with_the_files_name(
    data: bytes, suffix: str, folder: Path
) -> None:
    path = folder / f"bytes{suffix}"
    path.write_bytes(data)
    try:
        read(path, Limits())
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


@settings(max_examples=60)
@given(place=st.integers(0, 10**6), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_gzip_or_parquet_file_is_refused_or_read(
    place: int, flip: int, cut: bool, folder: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [f"document {i} " * 5 for i in range(50)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), parquet)
    for suffix, data in ((".gz", gzip.compress(lines)), (".parquet", parquet.getvalue())):
        damaged = bytearray(data)
        damaged[place % len(data)] ^= flip
        path = folder / f"damaged{suffix}"
        path.write_bytes(damaged[: place % len(data)] if cut else damaged)
        try:
            read(path, Limits())
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.9, 1 - 1e-5])
def test_of_a_gzip_file_that_is_cut_short_all_whole_lines_are_read(
    tmp_path: Path, keep: float
) -> None:
    lines = "".join(json.dumps({"text": str(i) * 20}) + "\n" for i in range(30000)).encode()
    whole = gzip.compress(lines)
    start = whole[: int(len(whole) * keep)]
    there = zlib.decompressobj(wbits=31).decompress(start).count(b"\n")
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(start)
    documents = iter(open_reader(path, ["text"], print))
    read = [next(documents) for _ in range(there)]
    assert len(read) > 0
    with pytest.raises(ValueError, match=rf"cut\.jsonl\.gz: cannot be read after line {there}: "):
        next(documents)


@pytest.mark.parametrize(
    ("name", "compress", "remedy"),
    [
        ("texts.jsonl", gzip.compress, r"gzip: .*\.gz"),
        ("texts.jsonl.gzip", gzip.compress, r"gzip: .*\.gz"),
        ("texts.jsonl.xz", lzma.compress, "xz, which is not read: decompress it"),
        ("texts.jsonl.bz2", bz2.compress, "bzip2, which is not read: decompress it"),
    ],
)
def test_a_file_of_another_format_than_its_name_says_is_no_bad_line(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes], remedy: str
) -> None:
    """Such a line could be skipped, and with it all of the file."""
    path = tmp_path / name
    path.write_bytes(compress(b'{"text": "a"}\n' * 50))
    with pytest.raises(ValueError, match=f"{path}: its content is {remedy}") as refused:
        read(path, Limits())
    assert not isinstance(refused.value, Unreadable)


def gzip_of(path: Path, block: bytes, times: int, start: bytes = b"", end: bytes = b"") -> Path:
    with gzip.open(path, "wb", 1) as file:
        file.write(start)
        for _ in range(times):
            file.write(block)
        file.write(end)
    return path


def test_a_bomb_of_one_line_takes_no_memory(tmp_path: Path) -> None:
    bomb = gzip_of(tmp_path / "bomb.jsonl.gz", b"a" * 2**20, 200, b'{"text": "', b'"}\n')
    limits = Limits(line_bytes=2**20, expansion=10**6)
    tracemalloc.start()
    try:
        documents, said = read(bomb, limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert documents == [] and len(said) == 1
    assert "line 1: the line is longer than 1,048,576 bytes" in said[0]
    assert peak < 8e6  # and not 200 MB
    assert bomb.stat().st_size < 2e6


@pytest.mark.parametrize("on_error", ("stop", "skip"))
def test_a_bomb_stops_the_run(run_preprocess: Run, tmp_path: Path, on_error: str) -> None:
    """Line by line it is text, or it is skipped: what tells is how small it was."""
    start = b"no document" if on_error == "skip" else b'{"text": ""}'
    lines = start + b" " * 2**16 + b"\n"
    bomb = gzip_of(tmp_path / "bomb.jsonl.gz", lines, 3 * HARMLESS // len(lines))
    result = run_preprocess("--input", bomb, "--on-error", on_error)
    assert result.code == 1
    assert f"{bomb}: " in result.error and "raise --max-expansion" in result.error
    assert list(tmp_path.iterdir()) == [bomb]


def test_limits_can_be_raised(run_preprocess: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "' + "a" * 100 + '"}\n{"text": "b"}\n')
    result = run_preprocess("--input", source, "--max-line-bytes", "100")
    assert f"{source}, line 1: the line is longer than 100 bytes" in result.error
    skipped = run_preprocess("--input", source, "--max-line-bytes", "100", "--on-error", "skip")
    assert skipped.out.startswith("1 document from 1 file, ") and " 1 skipped\n" in skipped.out
    assert run_preprocess("--input", source, "--max-line-bytes", "113", "--overwrite").code == 0


def test_a_parquet_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "bomb.parquet"
    table = pyarrow.table({"text": [f"{i}" + "a" * 2**20 for i in range(8)]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    with pytest.raises(Unreadable, match=r"row 1: the text is longer than 1,000,000 bytes"):
        list(open_reader(path, ["text"], fail, Limits(line_bytes=10**6)))
    monkeypatch.setattr(records, "HARMLESS", 2**20)
    with pytest.raises(ValueError, match=r"bomb\.parquet: .* raise --max-expansion"):
        list(open_reader(path, ["text"], fail, Limits()))
    assert len(list(open_reader(path, ["text"], fail, Limits(expansion=10**5)))) == 8


def fail(error: Unreadable) -> None:
    raise error


def test_a_record_of_many_fields_is_told_of_in_a_line(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({f"field {i}\n\x1b[2J": i for i in range(10**5)}) + "\n")
    documents, (message,) = read(source, Limits())
    assert documents == [] and len(message) < len(str(source)) + 700
    assert "and 99,990 more): name the one" in message and message.isprintable()


def test_a_huge_document_is_a_document(run_preprocess: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": "a word " * 10**5}) + "\n")
    result = run_preprocess("--input", source)
    assert result.code == 0 and result.out.startswith("1 document from 1 file, ")
