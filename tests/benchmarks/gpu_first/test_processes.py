"""One command and all that it starts, within its limits."""

import os
import sys
import uuid

import pytest

from benchmarks.gpu_first import processes

# A child in a session of its own, which hears no SIGTERM.
LEAVES = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"], start_new_session=True)
"""
CLOSES_ITS_OUTPUT = "import os, time; os.close(1); os.close(2); time.sleep(0.5)"


@pytest.fixture
def run(tmp_path):
    def run(code: str, seconds: float = 900, watch=lambda: "") -> tuple[processes.Ended, str]:
        mark, log = uuid.uuid4().hex, tmp_path / "log.txt"
        command = [sys.executable, "-c", code]
        ended = processes.run(command, tmp_path, os.environ, log, seconds, mark, watch)
        assert not processes.marked(mark)
        return ended, log.read_text().partition("\n")[2]

    return run


def test_what_a_command_leaves_behind_ends_with_it(run):
    ended, _ = run(LEAVES)
    assert (ended.code, ended.why) == (0, "")


def test_all_that_is_printed_is_in_the_log(run):
    ended, log = run("import sys; print('one'); print('x' * 100000); sys.exit('two')")
    assert (ended.code, log) == (1, f"one\n{'x' * 100000}\ntwo\n")


def test_a_limit_is_one_of_all_processes(run, monkeypatch, tmp_path):
    ready = tmp_path / "ready"  # as soon as it is there, the limit has passed
    monkeypatch.setattr(processes, "clock", lambda: 101.0 * ready.exists())
    ended, log = run(f"{LEAVES}open({str(ready)!r}, 'w')\nwhile True: pass", seconds=100)
    assert ended.code is None and ended.why == "not done after 100 s"
    assert "not done after 100 s: ended" in log
    assert ended.seconds == 101


def test_who_watches_may_end_it(run, tmp_path):
    ready = tmp_path / "ready"
    code = f"open({str(ready)!r}, 'w')\nwhile True: pass"
    ended, _ = run(code, watch=lambda: "enough" * ready.exists())
    assert (ended.code, ended.why) == (None, "enough")


def test_a_command_may_close_its_output_and_go_on(run):
    assert run(CLOSES_ITS_OUTPUT)[0].code == 0


def test_a_command_that_is_not_there_is_said_in_the_log(tmp_path):
    log = tmp_path / "log.txt"
    ended = processes.run(["no-such"], tmp_path, os.environ, log, 1, "m", lambda: "")
    assert ended.code == 127 and "No such file or directory: 'no-such'" in log.read_text()
