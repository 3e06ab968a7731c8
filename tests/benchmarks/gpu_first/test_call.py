"""The driver of the first minutes on a GPU: killed in every way, it loses nothing and goes on.

The stages are small scripts, the driver is the real one in a process of its own. Its clock is a
file that a stage moves when it has done what it was to do, so no machine is too slow for a limit.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks.gpu_first import processes, state
from tests.benchmarks.gpu_first.driver import PATIENCE, Clocked

pytestmark = pytest.mark.slow  # many processes, one after another

# A stage of these tests: what it does, and where it writes. One that goes on moves the clock by
# 100 s after its first rows.
SCRIPT = """
import ctypes, os, signal, subprocess, sys, time
does, folder = sys.argv[1:]
began = os.path.getsize(os.environ["CLOCK"])
rows = open(os.path.join(folder, "rows.csv"), "w", buffering=1)
rows.write("number,text\\n")
rows.write('1,"a, b"\\n')
open(os.path.join(folder, ".rows.csv.partial"), "w").close()
if does == "stays":  # with a child in a session of its own; neither hears SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "600"], start_new_session=True)
print(does, "begins", flush=True)
if does == "fails":
    raise ValueError("three is no prime\\nsecond line")
if does == "crashes":
    ctypes.string_at(0)
while does == "shouts":
    print("x" * 1000)
if does == "leaves":
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    sys.exit()
while does in ("stays", "writes"):
    rows.write("2,more\\n")
    rows.write("3,cut")  # a row that is not whole, whenever it is killed
    rows.flush()
    if os.path.getsize(os.environ["CLOCK"]) < began + 100:
        with open(os.environ["CLOCK"], "a") as clock:
            clock.write("." * 100)
    time.sleep(0.05)
    rows.write(" short\\n")
"""


@pytest.fixture
def driver(tmp_path):
    return Planned(tmp_path)


class Planned(Clocked):
    """The driver, on stages that do as their names say."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.script, self.table = folder / "stage.py", folder / "stages.toml"
        self.script.write_text(SCRIPT)
        self.flags += ["--stages", str(self.table), "--pack", str(folder / "pack")]

    def plan(self, *names: str, **fields: object) -> None:
        """Write the table of stages."""
        given = {"seconds": 600, "least": 0.1, "writes": "rows.csv"} | fields
        given["command"] = f"{{python}} {self.script} NAME {{folder}}"
        lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in given.items())
        stages = [
            f'[[stage]]\nname = "{name}"\nasks = "{name}?"\n{lines.replace("NAME", name)}\n'
            for name in names
        ]
        self.table.write_text("\n".join(stages))


def test_whatever_a_stage_does_the_next_ones_run_and_all_is_written_down(driver):
    driver.plan("fails", "works", "crashes", "leaves", "shouts", "ends")
    code, said = driver.run()
    assert code == 1
    driver.assert_whole()
    states = driver.states()
    assert states == {
        "fails": "failed", "works": "done", "crashes": "failed", "leaves": "done",
        "shouts": "failed", "ends": "done",
    }  # fmt: skip
    summary = driver.summary()
    assert "3 of 6 stages are done, 3 failed" in summary
    assert "- `fails`: ValueError: three is no prime\n" in summary
    assert "- `crashes`: ended by SIGSEGV" in summary
    assert "- `shouts`: printed more than 4 MB" in summary
    assert summary in said
    assert driver.rows()[0] == {
        "stage": "fails", "file": "rows.csv", "number": "1", "text": "a, b",
    }  # fmt: skip
    archived = driver.archived()
    assert b"works begins" in archived["stages/works/log.txt"]
    assert not any("/." in name for name in archived)
    assert len(archived["stages/shouts/log.txt"]) < processes.MAX_LOG + 2**16

    # What failed is tried once more, and then left.
    again, said = driver.run()
    assert again == 1 and "works:" not in said and "fails: failed" in said
    code, said = driver.run()
    assert code == 1 and "fails: failed" not in said and "To go on" not in driver.summary()


@pytest.mark.parametrize(
    ("does", "number"),
    [
        ("writes", signal.SIGTERM),
        pytest.param("writes", signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("writes", signal.SIGINT, marks=pytest.mark.long),
        pytest.param("stays", signal.SIGTERM, marks=pytest.mark.long),
        ("stays", signal.SIGKILL),
    ],
)
def test_a_killed_call_leaves_whole_files_and_no_process_and_the_next_one_goes_on(
    driver, does, number
):
    driver.plan("works", does, "ends")
    driver.kill(does, number, "begins")
    driver.assert_whole()
    told = driver.states()[does]
    assert told == ("begun" if number == signal.SIGKILL else "cut")
    assert driver.summary().count("works") and "`ends`" in driver.summary()

    driver.script.write_text(SCRIPT.replace('("stays", "writes")', "()"))  # it ends now
    code, said = driver.run()
    assert code == 0
    # One that may have killed the machine comes last, one that had to end for the call does not.
    first, last = ("ends", does) if number == signal.SIGKILL else (does, "ends")
    assert "works:" not in said and said.index(f"{first}: done") < said.index(f"{last}: done")
    driver.assert_whole()
    assert "3 of 3 stages are done" in driver.summary()
    how = "killed" if number == signal.SIGKILL else f"ended by {number.name}"
    assert how in driver.summary()


def test_a_stage_that_hangs_is_ended_at_its_limit(driver):
    driver.plan("stays", "ends", seconds=99)
    code, _ = driver.run()
    assert code == 1 and driver.states() == {"stays": "failed", "ends": "done"}
    assert "- `stays`: not done after 99 s" in driver.summary()
    assert {"stage": "stays", "file": "rows.csv", "number": "2", "text": "more"} in driver.rows()
    driver.assert_whole()


def test_when_the_time_is_used_up_the_rest_is_left_for_the_next_call(driver):
    driver.plan("works", "writes", "ends", least=1)
    code, said = driver.run("--minutes", "1.75")  # 105 s, of which 12 are for the end
    assert code == 0 and "the time is used up" in said
    assert driver.states() == {"works": "done", "writes": "cut"}
    assert "| `ends` | ends? | not reached |  |" in driver.summary()
    assert f"make gpu-first OUTPUT={driver.output} MINUTES=1.75 DEVICE=cpu\n" in driver.summary()
    driver.assert_whole()
    (driver.output / "rows.csv").unlink()  # between two calls it may be emptied
    driver.plan("works", "ends", "ends2")
    code, said = driver.run()
    assert code == 0 and "works:" not in said
    assert {row["stage"] for row in driver.rows()} == {"works", "ends", "ends2"}


def test_an_archive_hands_what_is_done_to_a_machine_that_knows_nothing(driver, tmp_path):
    driver.plan("works", "fails", "ends")
    driver.run("--only", "works")
    archive = tmp_path / "fetched.tar.gz"
    (driver.output / "archive.tar.gz").rename(archive)
    code, said = driver.run("--resume-from", str(archive), state="elsewhere")
    assert code == 1 and "works:" not in said and "ends: done" in said
    assert [row["stage"] for row in driver.rows()] == ["works", "fails", "ends"]
    assert "2 of 3 stages are done, 1 failed" in driver.summary()
    assert driver.summary().count(" of 8 min, ") == 2  # both calls
    driver.assert_whole()


def test_an_archive_of_another_code_or_none_is_refused_by_name(driver, tmp_path):
    driver.plan("works")
    driver.run()
    archive = driver.output / "archive.tar.gz"
    cut, text, none = (tmp_path / f"{name}.tar.gz" for name in ("cut", "text", "none"))
    cut.write_bytes(archive.read_bytes()[:-200])
    text.write_text("no archive")
    here = state.State.open(tmp_path / "elsewhere", "abc", "another", "rehearsal")
    for path, said in (
        (archive, "is of another code .* commit .* ANY_CODE=1"),
        (cut, "ended before"),
        (text, "not a gzip file"),
        (none, "No such file"),
    ):
        with pytest.raises(ValueError, match=f"--resume-from {path}: .*{said}"):
            state.adopt(here, path, any_code=False)
        assert not here.records and not list(here.folder.glob("stages/*"))
    assert state.adopt(here, archive, any_code=True) == ["works"]
    assert (here.stage_folder("works") / "rows.csv").exists()


def test_another_code_starts_afresh(tmp_path):
    here = state.State.open(tmp_path, "abc", "code1", "NVIDIA H200")
    here.begin("agree")
    here.end("agree", state.DONE, "", 1.0)
    assert state.State.open(tmp_path, "abc", "code1", "NVIDIA H200").records == here.records
    assert not state.State.open(tmp_path, "abc", "code2", "NVIDIA H200").records
    assert not state.State.open(tmp_path, "abc", "code1", "rehearsal").records


def test_a_tree_without_history_has_the_commit_of_its_pack(tmp_path, monkeypatch):
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")  # as if git were not installed
    assert state.commit(tmp_path) == "unknown"
    (tmp_path / "commit").write_text("abc123+\n")
    assert state.commit(tmp_path) == "abc123+"
    monkeypatch.setenv("BENCHMARK_COMMIT", "def456")
    assert state.commit(tmp_path) == "def456"


def test_a_stage_whose_module_is_missing_is_named_and_the_others_run(driver):
    driver.plan("works", needs=["no_such_module"])
    code, said = driver.run()
    assert code == 1
    assert "no_such_module is missing: pip install 'no_such_module', or bring its wheel" in said
    assert "- `works`: no_such_module is missing here" in driver.summary()


def test_no_call_begins_before_the_stages_of_a_killed_one_have_ended(driver):
    driver.plan("stays")
    process = driver.start()
    driver.wait_until_it_runs(process, "stays", "begins")
    process.kill()
    os.close(state.lock(driver.folder / "state", PATIENCE))
    assert not driver.left_over()
    process.communicate()


def test_a_stage_ends_with_its_call_even_if_nobody_is_left_to_end_it(driver):
    driver.plan("stays")
    process = driver.start()
    driver.wait_until_it_runs(process, "stays", "begins")
    (guard,) = [pid for pid in driver.left_over() if "benchmarks.gpu_first.guard" in command(pid)]
    os.kill(guard, signal.SIGKILL)
    process.kill()
    process.communicate()
    until = time.monotonic() + PATIENCE
    while any("stage.py" in command(pid) for pid in driver.left_over()):
        assert time.monotonic() < until
        time.sleep(0.02)
    for pid in driver.left_over():  # the stage's own child, in a session of its own
        assert command(pid).startswith("sleep")
        os.kill(pid, signal.SIGKILL)


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""


def test_one_call_at_a_time(tmp_path):
    descriptor = state.lock(tmp_path)
    with pytest.raises(ValueError, match="another call is at work"):
        state.lock(tmp_path, patience=0)
    os.close(descriptor)
    os.close(state.lock(tmp_path, patience=0))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--minutes", "0"], "--minutes is 0: use at least 0.1"),
        (["--only", "layer"], "--only names no stage: layer. There are works."),
        (["--stages", "none.toml"], "stages none.toml: "),
        (["--resume-form", "x"], "there is no flag --resume-form: did you mean --resume-from?"),
    ],
)
def test_a_misuse_is_one_line(driver, flags, said):
    driver.plan("works")
    code, output = driver.run(*flags)
    assert code == 2 and output.startswith(f"gpu_first: error: {said}"), output
    assert output.count("\n") == 1
