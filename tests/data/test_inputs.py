"""What a command line may name: files, folders and globs, of text as it stands or of records."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_dynmoe.data.text import readers, records
from megatron_dynmoe.data.text.inputs import expand_inputs
from megatron_dynmoe.data.text.readers import open_reader
from megatron_dynmoe.data.text.records import Limits, Unreadable
from megatron_dynmoe.settings.messages.command_line import UsageError

from .conftest import Run, outputs, write_jsonl

TEXT = "One line.\nAnother, with é and {braces}.\n"


def stop(error: Unreadable) -> None:
    raise error


def documents(path: Path, **limits: int) -> list[str]:
    return [text for (text,) in open_reader(path, ["text"], stop, Limits(**limits))]


def test_a_folder_stands_for_its_texts_in_their_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl.gz", "a/y.parquet", "C.TXT", "d.txt.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("README.md", ".hidden.txt", ".cache/a.txt", "a/picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in expand_inputs([str(tmp_path)])]
    assert found == ["C.TXT", "a/y.parquet", "a/z.jsonl.gz", "b.txt", "d.txt.zst"]
    with pytest.raises(UsageError, match=r"--input: .*b\.txt is named twice"):
        expand_inputs([str(tmp_path), str(tmp_path / "b.txt")])
    with pytest.raises(ValueError, match=r"\.cache2: the folder holds no text.*\.jsonl, .*\.txt"):
        (tmp_path / ".cache2").mkdir()
        expand_inputs([str(tmp_path / ".cache2")])


def test_plain_text_is_what_the_same_text_in_json_is(run_preprocess: Run, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "1.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    (folder / "2.txt.gz").write_bytes(gzip.compress(b"second"))
    write_jsonl(folder / "3.jsonl", ["third"])
    lines = write_jsonl(tmp_path / "all.jsonl", [TEXT, "second", "third"])
    for name, source in (("plain", folder), ("lines", lines), ("glob", f"{folder}/*")):
        result = run_preprocess("--input", source, "--output-prefix", tmp_path / name)
        assert result.code == 0, result.error
    assert outputs(tmp_path / "plain") == outputs(tmp_path / "lines") == outputs(tmp_path / "glob")


def test_a_long_plain_text_is_several_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "TXT_PIECE", 30)
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 20)
    pieces = documents(path)
    assert "".join(pieces) == TEXT * 20 and len(pieces) > 20
    assert all(len(piece) <= 30 for piece in pieces)
    assert all(piece.endswith(("\n", " ")) for piece in pieces)


def test_plain_text_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content, message in (
        ("latin.txt", "café".encode("latin-1"), r"latin\.txt: not valid UTF-8 .*iconv -f latin1"),
        ("wide.txt", "café".encode("utf-16"), r"wide\.txt: not valid UTF-8 .*iconv -f utf-16"),
        ("wide.jsonl", '{"text": ""}'.encode("utf-16"), r"wide\.jsonl, line 1: .*-f utf-16"),
        ("packed.txt", gzip.compress(b"a"), r"packed\.txt: its content is gzip: .*\.gz"),
        ("cut.txt.gz", gzip.compress(TEXT.encode() * 9)[:-9], r"cut\.txt\.gz: cannot be read"),
        ("a.pdf", b"%PDF-1.4\n", r"a\.pdf: its content is PDF, which is not read: make text"),
        ("lines.txt", b'{"body": "a"}\n', r"lines\.txt: its content is JSON lines: .*\.jsonl"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            documents(tmp_path / name)
    (tmp_path / "braces.txt").write_text("{x | x > 0}\n")
    assert documents(tmp_path / "braces.txt") == ["{x | x > 0}\n"]

    for module in (records, readers):
        monkeypatch.setattr(module, "HARMLESS", 2**20)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a" * 2**23))
    with pytest.raises(ValueError, match=r"bomb\.txt\.gz: .* raise --max-expansion"):
        documents(tmp_path / "bomb.txt.gz")


def test_text_in_another_encoding_can_be_left_out(run_preprocess: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 and more")
    assert run_preprocess("--input", tmp_path).code == 1
    result = run_preprocess("--input", tmp_path, "--on-error", "skip")
    assert result.out.startswith("1 document from 2 files, ") and ", 1 skipped\n" in result.out


def test_a_file_that_is_no_json_lines_is_told_what_it_may_be(
    run_preprocess: Run, tmp_path: Path
) -> None:
    for content, message in (
        ("Some words.\n", "line 1: not valid JSON (Expecting value, column 1): the name of plain "),
        ('[\n{"text": "a"}]\n', "column 1): each line has to be an object"),
        ('{"title": "a"}\n', "no field 'text' (it has title): name the one with the text by --jso"),
    ):
        (tmp_path / "in").write_text(content)
        result = run_preprocess("--input", tmp_path / "in")
        assert result.code == 1 and message in result.error
    with gzip.open(tmp_path / "howto.gz", "w") as file:
        file.write(b"Some words.\n")
    assert "plain text ends in .txt.gz" in run_preprocess("--input", tmp_path / "howto.gz").error
    # If all is skipped, so is the only hint.
    result = run_preprocess("--input", tmp_path / "in", "--on-error", "skip")
    assert "nothing was written (1 skipped, first " in result.error
    assert "--json-keys" in result.error


def test_the_key_has_two_names(run_preprocess: Run, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a"], key="body")
    for flag in ("--json-keys", "--text-key"):
        prefix = tmp_path / flag
        assert run_preprocess("--input", source, flag, "body", "--output-prefix", prefix).code == 0
    (tmp_path / "a.txt").write_text("a")
    result = run_preprocess("--input", tmp_path / "a.txt", "--json-keys", "title", "body")
    assert "a.txt is plain text, without the fields title, body" in result.error


@pytest.mark.parametrize("named", ["folder", "file"])
@pytest.mark.parametrize(
    "marks", [(), ("set/state.json",), ("set/state.json", "dataset_dict.json")]
)
def test_arrow_is_told_the_way_to_parquet(tmp_path: Path, named: str, marks: tuple) -> None:
    file = tmp_path / "set" / "data-00000-of-00001.arrow"
    file.parent.mkdir()
    for name in ("set/data-00000-of-00001.arrow", "set/dataset_info.json", *marks):
        (tmp_path / name).write_text(json.dumps({}))
    load = {
        0: f"Dataset.from_file('{file}').to_parquet('data-00000-of-00001.parquet')",
        1: f"load_from_disk('{file.parent}').to_parquet('set.parquet')",
        2: f"load_from_disk('{tmp_path}')['set'].to_parquet('set.parquet')",
    }[len(marks)]
    with pytest.raises(ValueError, match=r"is an Arrow file.*give Parquet") as refused:
        expand_inputs([str(file if named == "file" else tmp_path)])
    assert f'python -c "import datasets; datasets.{load}"' in str(refused.value)


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
@pytest.mark.parametrize("name", ["qwen.tiktoken", "tokenizer.model", "tekken.json"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_tiktoken_file_is_called_so(
    run_preprocess: Run, tmp_path: Path, kind: str, name: str, is_folder: bool
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "tokenizer").mkdir()
    file = tmp_path / "tokenizer" / name
    file.write_text("{}" if name == "tekken.json" else "IQ== 0\nIg== 1\n")
    model = file.parent if is_folder else file
    result = run_preprocess("--input", source, "--tokenizer-type", kind, "--tokenizer-model", model)
    assert result.code == 2
    assert f"--tokenizer-model is {file}, a tiktoken file, which is none of the supported" in (
        result.error
    )
    for supported in ("SentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer"):
        assert supported in result.error
