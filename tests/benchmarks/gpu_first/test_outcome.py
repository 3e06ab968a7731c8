"""What is read from a stage's files: rows, verdict, and the line that says why it failed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_first import outcome
from benchmarks.gpu_first.processes import Ended
from benchmarks.gpu_first.stages import Stage

ROOT = Path(__file__).resolve().parents[3]
TESTS = Stage("tests-x", "?", "", 1, 1, writes="tests.csv")
BENCH = Stage("select", "?", "", 1, 1, writes="select.csv")

OUT_OF_MEMORY = """$ python benchmarks/layer.py
[W1129 11:22:32.34 CPUAllocator.cpp:245] Memory block of unknown size
Traceback (most recent call last):
  File "a.py", line 3, in <module>
    raise torch.OutOfMemoryError
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB.
  warnings.warn(
"""
ENDED_PLAINLY = """$ python -m benchmarks.gpu_first.agree
some rows
3 of 21 differ, first layer a, 16384 tokens: output, 0.31

"""


@pytest.mark.parametrize(
    ("log", "code", "said"),
    [
        (OUT_OF_MEMORY, 1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB."),
        (OUT_OF_MEMORY, -9, "ended by SIGKILL after torch.OutOfMemoryError: CUDA out of memory."),
        (ENDED_PLAINLY, 1, "3 of 21 differ, first layer a, 16384 tokens: output, 0.31"),
        ("$ cmd\nFatal Python error: Segmentation fault\n", -11, "ended by SIGSEGV"),
        ("$ cmd\n", 3, "exit code 3"),
        ("$ cmd\nKeyboardInterrupt\n", 130, "KeyboardInterrupt"),
    ],
)
def test_the_line_that_says_why(log, code, said):
    assert outcome.reason(log, code).startswith(said)


def test_rows_are_read_whole_or_not_at_all(tmp_path):
    (tmp_path / "a.csv").write_text('x,y\n1,"two, words"\n3,fo')
    (tmp_path / "b.csv").write_text("x,z\n5,6,7\n8\n")
    assert outcome.rows_of(tmp_path) == [
        {"file": "a.csv", "x": "1", "y": "two, words"},
        {"file": "b.csv", "x": "5", "z": "6"},
        {"file": "b.csv", "x": "8", "z": ""},
    ]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("provider,failed\nours,\nstock,no memory\n", 0, ""),
        ("provider,failed\nours,no kernel\nstock,no memory\n", 0, "no kernel"),
        ("provider,failed\n", 0, "wrote no rows to select.csv"),
        (None, 0, "wrote no rows to select.csv"),
        ("provider,failed\nours,\n", 1, "exit code 1"),
    ],
)
def test_a_benchmark_that_measured_nothing_has_failed(tmp_path, text, code, said):
    if text is not None:
        (tmp_path / "select.csv").write_text(text)
    assert outcome.judge(BENCH, tmp_path, Ended(code, "", 1.0), rehearses=False) == said


def test_a_tests_rows_tell_of_each_as_it_ends_and_what_failed_is_named(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_left_out(): pass\n"
        "def test_bad():\n"
        "    assert 1 == 2, 'one is\\nnot two'\n"
        "def test_last():\n"
        "    import os; os._exit(9)\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    folder = tmp_path / "rows"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_first.pytest_rows"]
    command += ["--rows", str(folder / "tests.csv"), "-p", "no:cacheprovider", "--rootdir"]
    command += [str(tmp_path), "--continue-on-collection-errors", str(tmp_path)]
    # A worker of pytest-xdist leaves the rows to the process that started it, which this is not.
    alone = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True)
    assert done.returncode == 9
    rows = outcome.rows_of(folder)
    short = [(row["test"].rpartition(":")[2], row["outcome"], row["message"]) for row in rows]
    assert short == [
        ("test_broken.py", "failed", "E   ModuleNotFoundError: No module named 'no_such_module'"),
        ("test_good", "passed", ""),
        ("test_left_out", "skipped", "Skipped: no GPU"),
        ("test_bad", "failed", "AssertionError: one is"),
    ]
    why = outcome.judge(TESTS, folder, Ended(9, "", 1.0), rehearses=False)
    assert why.startswith("2 of 4 tests failed: ") and "no_such_module" in why


def test_tests_that_all_skip_have_shown_nothing_on_a_gpu(tmp_path):
    (tmp_path / "tests.csv").write_text("test,outcome,seconds,message\na,skipped,0,no GPU\n")
    ended = Ended(0, "", 1.0)
    assert outcome.judge(TESTS, tmp_path, ended, rehearses=True) == ""
    assert outcome.judge(TESTS, tmp_path, ended, rehearses=False) == "no test ran: 1 were skipped"
