"""The doctor: every line for what it is there to find, and never a crash."""

import json
import struct
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_dynmoe.data import check as data
from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check, guarded
from megatron_dynmoe.data.indexed import IndexedDatasetWriter
from megatron_dynmoe.doctor import machine, software
from megatron_dynmoe.doctor.__main__ import main
from megatron_dynmoe.doctor.table import write_table

REPOSITORY = Path(__file__).resolve().parents[2]
VOCABULARY = data.Vocabulary(100, 2, "tok.model")


@pytest.fixture
def prefix(tmp_path) -> str:
    """Two documents of 3 and 1 tokens, each ending in eod, and an empty one."""
    writer = IndexedDatasetWriter(tmp_path / "corpus_text_document", np.dtype(np.uint16))
    writer.add(np.array([5, 99, 2, 2], np.uint16), np.array([3, 0, 1], np.int32))
    writer.close()
    writer.publish()
    return str(tmp_path / "corpus_text_document")


def run(capsys, *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit:
        main(words)
    return exit.value.code, capsys.readouterr().out


@pytest.fixture
def without_software(monkeypatch):
    monkeypatch.setattr(software, "look", lambda timeout: [Check("Python", PASSED, "3.12")])


# -- software -------------------------------------------------------------------------------------


@pytest.mark.megatron
@pytest.mark.slow
def test_software_of_the_test_environment():
    checks = {check.name: check for check in software.look(timeout=900)}
    assert list(checks) == list(software.CHECKS)
    for name in ("Python", "PyTorch", "communication", "Megatron-Core", "back end"):
        assert checks[name].state == PASSED, checks[name]
    assert "tried" in checks["experts' GEMM"].found


def test_tested_versions_are_those_of_the_package():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"torch=={software.TESTED_TORCH}.*" in project["dependencies"]
    assert f"megatron-core=={software.TESTED_MEGATRON}" in project["dependencies"]
    first, last = software.TESTED_PYTHON
    assert project["requires-python"] == f">=3.{first[1]},<3.{last[1] + 1}"


def test_a_hanging_import_is_a_line(monkeypatch):
    said = f'echo \'{software.MARK}["Python", "passed", "3", ""]\''
    command = ["sh", "-c", f"{said}; exec sleep 600"]
    popen = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda _, **options: popen(command, **options))
    for seconds in (1, 10, 900):  # until the machine is not too busy for a shell to speak
        first, second, *rest = software.look(seconds)
        if first.state == PASSED:
            break
    assert first == Check("Python", PASSED, "3")
    assert second[:3] == ("megatron-dynmoe", FAILED, f"no answer within {seconds} s")
    assert {check.state for check in rest} == {FAILED}


def test_a_crash_is_a_line_with_its_last_words(monkeypatch):
    died = SimpleNamespace(stdout="", stderr="a\nundefined symbol\n", returncode=-11)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: died)
    assert software.look(1)[0].found == "the process ended with SIGSEGV: undefined symbol"


def test_an_error_in_a_check_is_its_result():
    assert guarded("x", lambda: 1 / 0)[:3] == ("x", FAILED, "ZeroDivisionError: division by zero")


# -- data -----------------------------------------------------------------------------------------


def test_data_that_fits(prefix):
    check = data.check_dataset(prefix, VOCABULARY)
    assert check.state == PASSED
    assert "4 tokens in 3 documents, highest id 99" in check.found


@pytest.mark.parametrize(
    ("vocabulary", "state", "words"),
    [
        (None, WARNING, "--tokenizer-model"),
        (data.Vocabulary(99, 2, "tok"), FAILED, "tok has ids to 98"),
        (data.Vocabulary(100, 7, "tok"), WARNING, "do not end with eod"),
        (data.Vocabulary(100, None, "tok"), PASSED, ""),
    ],
)
def test_data_against_a_vocabulary(prefix, vocabulary, state, words):
    check = data.check_dataset(prefix, vocabulary)
    assert check.state == state and words in check.found + check.remedy


def damage(prefix: str, how: str) -> None:
    idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
    content = bytearray(idx.read_bytes())
    if how == "no bin":
        bin_.unlink()
    elif how == "short bin":
        bin_.write_bytes(bin_.read_bytes()[:-2])
    elif how == "short idx":
        idx.write_bytes(content[:-8])
    elif how == "other file":
        idx.write_bytes(b"tokens" * 20)
    elif how == "token type":
        content[17] = 77
        idx.write_bytes(content)
    elif how == "bounds":
        content[-8:] = struct.pack("<q", 1)
        idx.write_bytes(content)
    elif how.startswith("offset "):
        start = data.HEADER.size + (3 + 2 * int(how[-1])) * 4
        content[start : start + 8] = struct.pack("<q", 2)
        idx.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no bin", "there is no corpus_text_document.bin"),
        ("short bin", "has 6 bytes, but corpus_text_document.idx speaks of 8"),
        ("short idx", "should have"),
        ("other file", "is no index of Megatron's"),
        ("token type", "token type 77"),
        ("bounds", "is damaged"),
        ("offset 0", "is damaged"),
        ("offset 1", "is damaged"),
        ("offset 2", "is damaged"),
    ],
)
def test_damaged_data(prefix, how, words):
    damage(prefix, how)
    check = data.check_dataset(prefix, VOCABULARY)
    assert check.state == FAILED and words in check.found
    assert "copy both files again" in check.remedy  # and not the prefix that was given


def test_a_path_that_is_nearly_right(prefix):
    assert f"give {prefix}" in data.check_dataset(prefix + ".bin", None).remedy
    short = prefix.removesuffix("_text_document")
    assert f"did you mean {prefix}?" in data.check_dataset(short, None).remedy


def test_a_large_file_is_looked_at_in_pieces(prefix, monkeypatch):
    monkeypatch.setattr(data, "PIECE_BYTES", 2)
    assert "among 2 looked at" in data.check_dataset(prefix, VOCABULARY, max_bytes=4).found


def test_weights_in_the_data_path_are_no_prefixes():
    assert data.prefixes(["0.3", "a", "0.7", "b"]) == ["a", "b"]
    assert data.prefixes(["a", "b"]) == ["a", "b"]
    assert data.prefixes(["7"]) == ["7"]


def test_a_tokenizer_that_does_not_load(tmp_path):
    check, vocabulary = data.check_tokenizer(None, str(tmp_path / "no.model"))
    assert check.state == FAILED and "no such file" in check.found and vocabulary is None


# -- machine --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "size", "number", "state", "words"),
    [
        (50e9, None, None, PASSED, "50.0 GB free"),
        (50e9, 48e9, None, PASSED, "a checkpoint takes about 48.0 GB"),
        (50e9, 48e9, 2, WARNING, "the run keeps 2: 96.0 GB"),
        (40e9, 48e9, 2, FAILED, "40.0 GB free"),
    ],
)
def test_disk_space(tmp_path, monkeypatch, free, size, number, state, words):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    check = machine.check_space(tmp_path / "not" / "there", size, number)
    assert check.state == state and words in check.found


def test_folders(tmp_path):
    assert machine.check_writable("x", tmp_path).state == PASSED
    assert "will be made" in machine.check_writable("x", tmp_path / "a" / "b").found
    assert not list(tmp_path.iterdir())
    assert "/proc is not writable" in machine.check_writable("x", Path("/proc/nothing")).found
    (tmp_path / "file").touch()
    assert machine.check_writable("x", tmp_path / "file").state == FAILED


@pytest.mark.parametrize(
    ("variables", "slurm", "launcher"),
    [
        ({}, PASSED, PASSED),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, WARNING, PASSED),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "RANK": "0"}, PASSED, FAILED),
        ({"MASTER_ADDR": "node1"}, PASSED, WARNING),
        (dict.fromkeys(machine.LAUNCHER_VARIABLES, "1"), PASSED, PASSED),
    ],
)
def test_slurm_and_launcher(monkeypatch, variables, slurm, launcher):
    for name in (*machine.LAUNCHER_VARIABLES, "SLURM_JOB_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machine.check_slurm().state == slurm
    assert machine.check_launcher().state == launcher


# -- the command ----------------------------------------------------------------------------------


def test_json_and_exit_codes(capsys, prefix, tmp_path, without_software):
    words = ["--data-path", prefix, "--vocab-size", "100", "--save", str(tmp_path / "run")]
    code, output = run(capsys, *words, "--json")
    report = json.loads(output)
    assert code == 0 and report["failed"] == 0
    assert {"check": "data", "state": PASSED} in [
        {"check": check["name"], "state": check["state"]} for check in report["checks"]
    ]
    code, output = run(capsys, *words, "--data-path", "nowhere")
    assert code == 1 and "1 failed" in output


def test_an_unknown_recipe_is_told_before_anything_is_looked_at(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--recipe", "dtop_16e"])
    output = capsys.readouterr()
    assert exit.value.code == 2 and not output.out
    assert "did you mean dtop_p_16e?" in output.err


@pytest.mark.megatron
def test_a_recipe_is_compared_with_the_disk(capsys, tmp_path, without_software):
    code, output = run(capsys, "--recipe", "smoke", "--save", str(tmp_path))
    assert code == 0 and "the run keeps 2" in " ".join(output.split())


@pytest.mark.parametrize("words", [["--data", "x"], ["--vocab-size", "many"], ["x"]])
def test_usage(capsys, words):
    assert run(capsys, *words)[0] == 2


def test_table_in_ascii_and_wrapped(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    checks = [Check("a name", PASSED, "word " * 30), Check("b", FAILED, "found", "do this")]
    with open(tmp_path / "table", "w", encoding="ascii") as file:
        write_table(checks, file)
    text = (tmp_path / "table").read_text()
    assert max(map(len, text.splitlines())) <= 70
    assert "x failed" in text and "-> do this" in text and "1 passed, 0 warnings, 1 failed" in text
