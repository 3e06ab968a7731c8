"""What torchrun shows last: the ranks' own words if they are plain."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_dynmoe.torchrun_plugin import in_few_lines, rendezvous_handler

pytestmark = pytest.mark.slow  # torchrun starts for each

RANK = """
import sys
from torch.distributed.elastic.multiprocessing.errors import record
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.messages.exits import (
    exiting_on_misuse, report_to_torchrun, without_traceback,
)

@record
def main():
    try:
        sys.exit(0)
    except SystemExit:
        {end}

main()
"""


def seen(end: str, folder: Path, capsys: pytest.CaptureFixture) -> tuple[str, list[object]]:
    """What torchrun writes, and what is left to Python's own hook, after a rank that ends so."""
    file = folder / "error.json"
    done = subprocess.run(
        [sys.executable, "-c", RANK.format(end=end)],
        env={"TORCHELASTIC_ERROR_FILE": str(file), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        timeout=900,
    )
    assert done.returncode and "message" in json.loads(file.read_text())
    failure = ProcessFailure(local_rank=1, pid=0, exitcode=done.returncode, error_file=str(file))
    error = ChildFailedError("megatron_dynmoe.pretrain", {3: failure})
    shown: list[object] = []
    in_few_lines(lambda *what: shown.append(what[1]))(ChildFailedError, error, None)
    return capsys.readouterr().err, shown


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("report_to_torchrun(UsageError('no such: flag')); sys.exit(143)", 143),
        ("with without_traceback(): raise ValueError('no such: flag') from None", 1),
    ],
    ids=["told", "refused"],
)
def test_a_rank_that_says_why_in_a_line_has_the_last_word(tmp_path, capsys, end, code) -> None:
    said, shown = seen(end, tmp_path, capsys)
    assert said == f"torchrun: rank 3 ended with exit code {code}: no such: flag\n"
    assert not shown


def test_torchrun_ends_as_its_ranks_where_the_command_line_is_to_blame(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        seen("with exiting_on_misuse(): raise UsageError('no such: flag')", tmp_path, capsys)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "torchrun: rank 3 ended with exit code 2: no such: flag\n"


def test_a_stack_is_shown_as_ever(tmp_path, capsys) -> None:
    said, shown = seen("raise KeyError('a fault')", tmp_path, capsys)
    assert said == "" and len(shown) == 1


def test_an_end_by_a_signal_needs_no_words(capsys) -> None:
    shown: list[object] = []
    in_few_lines(lambda *what: shown.append(what))(SignalException, SignalException("", 2), None)
    assert capsys.readouterr().err == "" and not shown
    in_few_lines(lambda *what: shown.append(what))(OSError, OSError("a fault"), None)
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("words", "is_brief"),
    [
        (["-m", "megatron_dynmoe.pretrain"], True),
        (["--no-python", "bash", "/a/checkout/launch/rank.sh"], True),
        (["train.py"], False),
    ],
)
def test_only_the_last_words_of_our_ranks_are_kept_short(monkeypatch, words, is_brief) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["torchrun", "--local-addr", "127.0.0.1", *words])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    rendezvous_handler()
    assert (sys.excepthook is not sys.__excepthook__) == is_brief
