"""The pipeline as its users see it: what is written, what is refused, what is left behind."""

import contextlib
import gzip
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_dynmoe.data.preprocess import preprocess
from megatron_dynmoe.data.tokenizer import Tokenizer

from .conftest import CORPUS, ODD_TEXTS, ROOT, Run, outputs, save_hf, write_jsonl

TOOL = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
PATIENCE = 120  # seconds until something has to happen, on a busy machine


def parquet(path: Path, texts: Sequence[str | None], **options: object) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), path, **options)
    return path


def zstd(path: Path, data: bytes) -> Path:
    import pyarrow

    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(data)
    return path


# What is written


def test_formats_agree(run_preprocess: Run, tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", ODD_TEXTS)
    data = plain.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))
    zstd(tmp_path / "a.jsonl.zst", data)
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    parquet(tmp_path / "a.parquet", ODD_TEXTS, row_group_size=3)
    written = {}
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "windows.jsonl", "a.parquet"):
        prefix = tmp_path / name
        result = run_preprocess("--input", tmp_path / name, "--output-prefix", prefix)
        assert result.code == 0, result.error
        written[name] = outputs(prefix)
    assert len(set(written.values())) == 1


def test_inputs_are_read_in_order(run_preprocess: Run, tmp_path: Path) -> None:
    whole = write_jsonl(tmp_path / "whole", ODD_TEXTS)
    parts = [
        write_jsonl(tmp_path / f"part{i}.jsonl", ODD_TEXTS[start : start + 6])
        for i, start in enumerate((0, 6, 12))
    ]
    for name, inputs in (
        ("one", ["--input", whole]),
        ("list", ["--input", *parts]),
        ("flags", ["--input", parts[0], "--input", *parts[1:]]),
        ("glob", ["--input", tmp_path / "part*.jsonl"]),
    ):
        assert run_preprocess(*inputs, "--output-prefix", tmp_path / name).code == 0
    assert outputs(tmp_path / "one") == outputs(tmp_path / "list")
    assert outputs(tmp_path / "one") == outputs(tmp_path / "flags")
    assert outputs(tmp_path / "one") == outputs(tmp_path / "glob")


def test_workers_do_not_change_the_output(run_preprocess: Run, tmp_path: Path) -> None:
    for workers in (1, 2, 5):
        prefix = tmp_path / str(workers)
        inputs = ("--input", CORPUS / "book.jsonl.gz", "--output-prefix", prefix)
        assert run_preprocess(*inputs, "--append-eod", "--workers", workers).code == 0
    assert outputs(tmp_path / "1") == outputs(tmp_path / "2") == outputs(tmp_path / "5")


def test_several_keys(run_preprocess: Run, tmp_path: Path) -> None:
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps({"a": t, "b": t[::-1]}) + "\n" for t in ODD_TEXTS[:8]))
    one = write_jsonl(tmp_path / "one.jsonl", [t[::-1] for t in ODD_TEXTS[:8]], key="b")
    assert run_preprocess("--input", both, "--json-keys", "a", "b").code == 0
    assert run_preprocess("--input", one, "--json-keys", "b", "--output-prefix", tmp_path / "b")
    assert outputs(tmp_path / "out", "b") == outputs(tmp_path / "b", "b")
    assert outputs(tmp_path / "out", "a") != outputs(tmp_path / "out", "b")


def test_summary(run_preprocess: Run, sp_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "12"}\nnonsense\n{"text": "3"}\n')
    result = run_preprocess("--input", source, "--on-error", "skip", "--append-eod")
    counts, written, use = result.out.splitlines()
    assert counts.startswith("2 documents from 1 file, 5 tokens, 0.00 MB of text in ")
    assert counts.endswith(" tokens/s), 1 skipped")
    prefix = tmp_path / "out_text_document"
    assert written == f"written: {prefix}.bin and .idx"
    assert use.startswith(f"to train on it: --data-path {prefix} --tokenizer-type Sentence")
    assert use.endswith(f" --tokenizer-model {sp_model}")
    assert result.error == ""


# What is refused

UNREADABLE = {
    "nonsense": b"nonsense",
    "cut short": b'{"text": "a',
    "empty line": b"",
    "no object": b'["text"]',
    "other fields": b'{"title": "a"}',
    "number": b'{"text": 3}',
    "null": b'{"text": null}',
    "list": b'{"text": ["a"]}',
    "not UTF-8": b'{"text": "\xff"}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
    "nested too deeply": b"[" * 100_000,
}


@pytest.mark.parametrize("line", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_lines(line: bytes, run_preprocess: Run, tmp_path: Path) -> None:
    good = b'{"text": "a"}\n'
    source = tmp_path / "in.jsonl"
    source.write_bytes(good + line + b"\n" + good)
    result = run_preprocess("--input", source)
    assert result.code == 1
    assert f"{source}, line 2: " in result.error
    assert list(tmp_path.iterdir()) == [source]

    assert " 1 skipped\n" in run_preprocess("--input", source, "--on-error", "skip").out
    source.write_bytes(good + good)
    assert run_preprocess("--input", source, "--output-prefix", tmp_path / "good").code == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "good")


def test_unreadable_parquet_row(run_preprocess: Run, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"good", b"\xff"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "in.parquet")
    result = run_preprocess("--input", tmp_path / "in.parquet")
    assert "in.parquet, row 2: not valid UTF-8" in result.error
    parquet(tmp_path / "in.parquet", ["good", None])
    result = run_preprocess("--input", tmp_path / "in.parquet")
    assert "in.parquet, row 2: field 'text' is no string but null" in result.error
    result = run_preprocess("--input", tmp_path / "in.parquet", "--on-error", "skip")
    assert " 1 skipped\n" in result.out


def test_inputs_that_cannot_be_used(run_preprocess: Run, tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", ["text " * 50] * 200).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-20])
    zst = zstd(tmp_path / "cut.jsonl.zst", lines)
    zst.write_bytes(zst.read_bytes()[:-20])
    (tmp_path / "no.jsonl.gz").write_bytes(lines)
    (tmp_path / "no.parquet").write_bytes(lines)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    parquet(tmp_path / "a.parquet", ["a"])
    before = sorted(tmp_path.iterdir())
    misused = (
        (["missing.jsonl"], "missing.jsonl: there is no such file"),
        (["*.nothing"], r"*.nothing: there is no such file, and no file matches"),
        (["a.jsonl", "a.*"], "named twice"),
    )
    for args, message in (
        *misused,
        (["cut.jsonl.gz"], "cut.jsonl.gz: cannot be read after line"),
        (["cut.jsonl.zst"], "cut.jsonl.zst: cannot be read after line"),
        (["no.jsonl.gz"], "no.jsonl.gz: cannot be read after line 0"),
        (["no.parquet"], "no.parquet: cannot be read after row 0"),
        (["a.parquet", "--json-keys", "body"], "no column 'body'; its columns are text"),
        (["empty.jsonl"], "no documents in"),
    ):
        result = run_preprocess("--input", str(tmp_path / args[0]), *args[1:])
        if args == ["a.jsonl", "a.*"]:
            result = run_preprocess("--input", *(str(tmp_path / name) for name in args))
        assert result.code == (2 if (args, message) in misused else 1)
        assert message in result.error
        # A damaged file is no line to skip.
        assert run_preprocess("--input", tmp_path / args[0], *args[1:], "--on-error", "skip").code
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_that_cannot_be_written(run_preprocess: Run, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    result = run_preprocess("--input", source, "--output-prefix", tmp_path / "no" / "out")
    assert result.code == 2
    assert f"--output-prefix is {tmp_path}/no/out: there is no folder" in result.error
    # Even root cannot write there.
    result = run_preprocess("--input", source, "--output-prefix", "/proc/out")
    assert result.code == 2 and "nothing can be written to /proc (" in result.error


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_overwriting_is_asked_for(suffix: str, run_preprocess: Run, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    old = tmp_path / f"out_text_document{suffix}"
    old.write_text("old")
    result = run_preprocess("--input", source)
    assert result.code == 2 and f"--output-prefix: {old} exists" in result.error
    assert old.read_text() == "old"
    assert run_preprocess("--input", source, "--overwrite").code == 0
    assert outputs(tmp_path / "out")[1].startswith(b"MMIDIDX")


def test_tokenizers_that_cannot_be_used(run_preprocess: Run, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    for args, message in (
        (["--tokenizer-model", "missing.model"], "missing.model: there is no such file or folder"),
        (["--tokenizer-model", source], "is no SentencePiece model: give a Sent"),
        (["--tokenizer-type", "HuggingFaceTokenizer"], "cannot be loaded"),
    ):
        result = run_preprocess("--input", source, *args)
        assert result.code == 2 and "--tokenizer-model is " in result.error
        assert message in result.error
    folder = save_hf(Tokenizer(models.BPE()), tmp_path, bos_token=None, eos_token=None)
    hf = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder)
    result = run_preprocess("--input", source, *hf, "--append-eod")
    assert result.code == 2 and "no end-of-document (eos) token" in result.error


@pytest.mark.parametrize(
    "args",
    [
        ["--split-sentences"],
        ["--lang", "english"],
        ["--partitions", "2"],
        ["--tokenizer-type", "GPT2BPETokenizer"],
        ["--workers", "0"],
    ],
)
def test_flags_that_make_no_sense(args: list[str], run_preprocess: Run, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    result = run_preprocess("--input", source, *args)
    assert result.code == 2 and f"{args[0]}" in result.error.splitlines()[-1]


# What is left behind


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing_finished(
    how: signal.Signals, sp_model: Path, tmp_path: Path
) -> None:
    # The run waits in the middle of its input for as long as this end of the pipe is open.
    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    os.mkfifo(source)
    folder.mkdir()
    command = [*TOOL, "--input", source, "--output-prefix", folder / "data"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sp_model]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with open(source, "w") as pipe:
        pipe.write('{"text": "' + "a word " * 100_000 + '"}\n')
        pipe.flush()
        end = time.monotonic() + PATIENCE
        while not list(folder.iterdir()):
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(how)
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    left = [path.name for path in folder.iterdir()]
    if how == signal.SIGKILL:
        assert left and all(name.endswith(".partial") for name in left)
    else:
        assert left == []
        assert error == "preprocess_data.py: interrupted: nothing was written\n"


def test_a_full_disk_leaves_nothing(
    run_preprocess: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    monkeypatch.setattr("megatron_dynmoe.data.indexed.IndexedDatasetWriter.add", fail)
    result = run_preprocess("--input", source)
    assert result.code == 1 and "No space left on device" in result.error
    assert list(tmp_path.iterdir()) == [source]


# What it costs


def test_start_up_imports_no_framework() -> None:
    code = (
        "import sys; import megatron_dynmoe.cli.preprocess as c, megatron_dynmoe.data.preprocess\n"
        "c._parser().format_help()\n"
        "heavy = {'torch', 'megatron', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_encoding_imports_no_framework(sp_model: Path, hf_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    code = (
        "import sys; from megatron_dynmoe.data.preprocess import preprocess\n"
        "from megatron_dynmoe.data.tokenizer import build_tokenizer\n"
        "source, out, sp, hf = sys.argv[1:]\n"
        "preprocess([source], out + '1', build_tokenizer('Llama2Tokenizer', sp))\n"
        "preprocess([source], out + '2', build_tokenizer('HuggingFaceTokenizer', hf))\n"
        "heavy = {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    args = [str(source), str(tmp_path / "out"), str(sp_model), str(hf_folder)]
    subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, check=True)


class OneTokenACharacter(Tokenizer):
    """As fast as can be, so that a large input is a quick test."""

    vocab_size, eod = 256, 0

    def encode_batch(self, texts: list[str]) -> Sequence[np.ndarray]:
        return [np.ones(len(text), np.int32) for text in texts]


def test_memory_is_bounded(tmp_path: Path) -> None:
    with open(tmp_path / "in.jsonl", "w") as file:
        file.writelines([json.dumps({"text": "x" * 100_000}) + "\n"] * 400)
    tracemalloc.start()
    try:
        preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), OneTokenACharacter())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16e6  # 80 MB without a bound


# What it says on the way


def test_progress_goes_to_stderr(sp_model: Path, tmp_path: Path) -> None:
    command = [*TOOL, "--input", CORPUS / "book.jsonl.gz", "--output-prefix", tmp_path / "out"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sp_model]
    done = subprocess.run([*command, "--log-interval", "20"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 3 and done.stdout.startswith("85 documents from 1 file, ")
    lines = done.stderr.splitlines()
    assert lines and all(
        all(part in line for part in (" %: ", "documents/s", "MB/s", "s left")) for line in lines
    )


def test_a_bar_on_a_terminal(sp_model: Path, tmp_path: Path) -> None:
    command = [*TOOL, "--input", CORPUS / "book.jsonl.gz", "--output-prefix", tmp_path / "out"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sp_model]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    # Read on the way: it holds some kilobytes, and the bar of a slow machine would wait for ever.
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that its other end is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    assert all(part in shown.decode() for part in ("documents/s", "MB/s", "left", "100%|"))
