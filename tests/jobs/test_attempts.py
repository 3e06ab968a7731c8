"""Attempts of a run: what each is started with, and what follows from how it ended."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from megatron_dynmoe.jobs.attempts import (
    DONE,
    FAILED,
    GO_ON,
    REFUSED,
    begin,
    end,
    is_finished,
)
from megatron_dynmoe.runs.folder import mark_finished, mark_stopped
from megatron_dynmoe.settings.messages.words import values_of


@pytest.fixture(autouse=True)
def job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("DYNMOE_CONFIG", raising=False)


@pytest.fixture
def start(tmp_path):
    """Begins the next attempt of one run of the smoke recipe."""

    def start(*flags: str) -> Path:
        return begin("smoke", ["--run-dir", str(tmp_path / "run"), *flags], 1, max_restarts=2)

    return start


def save(run_dir: Path, iteration: int) -> None:
    """Leave what Megatron leaves when a checkpoint is complete."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def flags_of(attempt: Path) -> dict[str, list[str]]:
    return values_of(shlex.split((attempt / "flags.txt").read_text()))


def test_it_goes_on_from_its_own_checkpoint_and_only_then(start, tmp_path):
    first = start("--load", "elsewhere", "--finetune", "--lr", "1")
    assert first == tmp_path / "run" / "attempts" / "0001"
    assert flags_of(first)["load"] == ["elsewhere"]
    (tmp_path / "run" / "checkpoints" / "iter_0000003").mkdir(parents=True)  # never completed
    assert "exit-on-missing-checkpoint" not in flags_of(start())
    save(tmp_path / "run", 3)
    third = start("--load", "elsewhere", "--finetune", "--ckpt-step", "9", "--lr", "1")
    flags = flags_of(third)
    assert flags["load"] == [str(tmp_path / "run" / "checkpoints")]
    assert "exit-on-missing-checkpoint" in flags
    assert "finetune" not in flags and "ckpt-step" not in flags
    assert flags["lr"] == ["1"]


def test_checkpoints_may_lie_elsewhere(start, tmp_path):
    save(tmp_path / "far", 4)
    attempt = start("--save", str(tmp_path / "far" / "checkpoints"))
    assert flags_of(attempt)["load"] == [str(tmp_path / "far" / "checkpoints")]


def test_events_that_no_checkpoint_covers_are_put_aside(start, tmp_path):
    events = tmp_path / "run" / "tensorboard"
    start()
    events.mkdir()
    second = start()
    assert not events.exists() and (second / "tensorboard-before").exists()
    save(tmp_path / "run", 3)
    events.mkdir()
    start()
    assert events.exists()


def test_the_clusters_data_is_left_out_where_data_is_made_up(start):
    assert "data-path" not in flags_of(start("--data-path", "1", "nowhere", "--lr", "1"))


def test_an_attempt_tells_where_it_came_from(start, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hidden")
    monkeypatch.setenv("MY_PASSWORD", "hidden")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    attempt = start()
    environment = (attempt / "environment.txt").read_text()
    assert "NCCL_DEBUG=INFO" in environment and "# torch 2" in environment
    assert "WANDB_API_KEY=(left out)" in environment and "hidden" not in environment
    assert (attempt / "commit.txt").read_text()
    assert (attempt / "changes.diff").exists()


def test_changed_flags_are_told(start, capsys):
    start("--lr", "1")
    assert "flags since" not in capsys.readouterr().err
    start("--lr", "2")
    told = capsys.readouterr().err
    assert "flags since attempt 1: - --lr 1" in told and "flags since attempt 1: + --lr 2" in told


def test_a_flag_that_a_later_one_overrides_has_not_changed(start, tmp_path, capsys):
    for default in ("runs/my-080000", "runs/my-090000"):
        attempt = start("--run-dir", default, "--run-dir", str(tmp_path / "run"))
    assert attempt.name == "0002"
    assert "flags since" not in capsys.readouterr().err


def test_numbers_go_on_after_the_last_attempt_whatever_was_deleted(start, tmp_path, capsys):
    first = start("--lr", "1")
    (first.parent / "9999").mkdir()
    (first.parent / "old").mkdir()
    shutil.rmtree(first)
    assert start("--lr", "1").name == "10000"
    assert start("--lr", "2").name == "10001"
    told = capsys.readouterr().err
    assert "attempt 10001 of" in told and "flags since attempt 10000: + --lr 2" in told


@pytest.mark.parametrize("text", [None, "", '{"job": '])
def test_an_attempt_without_its_record_counts_for_nothing(start, text):
    for _ in range(3):
        attempt = start()
    (attempt.parent / "0004").mkdir()  # ended before it had written anything
    if text is not None:
        (attempt.parent / "0004" / "attempt.json").write_text(text)
    with pytest.raises(ValueError, match="job 7 has started 3 times"):
        start()
    (attempt / "attempt.json").unlink()
    fifth = start()
    assert fifth.name == "0005"
    (fifth / "attempt.json").unlink()
    assert end(fifth, 1, was_stopped=False) == FAILED
    start()


@pytest.mark.parametrize("flag", ["train-iters", "train-samples"])
@pytest.mark.parametrize("is_done", [False, True])
def test_a_length_that_is_no_whole_number_is_named(start, tmp_path, flag, is_done):
    if is_done:
        (tmp_path / "run").mkdir()
        mark_finished(tmp_path / "run", 20, 160)
    with pytest.raises(ValueError, match=f"--{flag} is 1e5: use a whole number from 0 up"):
        start(f"--{flag}", "1e5")


def test_bad_flags_open_no_attempt(start, tmp_path):
    with pytest.raises(ValueError, match="without a pipeline"):
        start("--num-layers", "5", "--num-virtual-stages-per-pipeline-rank", "2")
    assert not list(tmp_path.iterdir())


def test_a_job_restarts_so_often_without_progress_and_no_more(start, tmp_path, monkeypatch):
    for _ in range(3):
        start()
    with pytest.raises(ValueError, match="job 7 has started 3 times from the start without a new"):
        start()
    save(tmp_path / "run", 5)
    for _ in range(3):
        start()
    with pytest.raises(ValueError, match="3 times from iteration 5"):
        start()
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # somebody has looked into it
    start()


@pytest.mark.parametrize(
    ("status", "stopped", "saved", "flags", "verdict", "words"),
    [
        (0, False, 3, (), GO_ON, "stopped before its end"),
        (0, True, 3, (), GO_ON, "checkpoint 3"),
        (143, True, None, (), GO_ON, "no checkpoint"),
        (1, False, None, (), FAILED, "trying again would fail again"),
        (1, False, 3, (), GO_ON, "it had saved a new checkpoint"),
        (1, "SIGTERM", 3, (), GO_ON, "stopped before its end"),
        (0, False, 3, ("--exit-interval", "3"), DONE, "stopped at --exit-interval 3"),
    ],
)
def test_how_it_ended_decides_what_follows(
    start, tmp_path, capsys, monkeypatch, status, stopped, saved, flags, verdict, words
):
    attempt = start(*flags)
    if saved:
        save(tmp_path / "run", saved)
    if isinstance(stopped, str):  # heard by the ranks alone
        monkeypatch.setenv("ATTEMPT", str(attempt))
        mark_stopped(stopped)
    assert end(attempt, status, stopped is True) == verdict
    assert words in capsys.readouterr().out
    record = json.loads((attempt / "attempt.json").read_text())
    assert (record["status"], record["reached"], record["job"]) == (status, saved, "7")


def test_an_unreadable_tracker_does_not_start_anew(start, tmp_path, capsys):
    save(tmp_path / "run", 3)
    (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("")
    (tmp_path / "run/tensorboard").mkdir()
    flags = flags_of(start())
    assert "ckpt-fallback" in flags and "exit-on-missing-checkpoint" in flags
    assert "from the newest good checkpoint" in capsys.readouterr().err
    assert (tmp_path / "run/tensorboard").exists()


def test_a_failure_after_a_fallback_goes_on_from_there(start, tmp_path):
    save(tmp_path / "run", 6)
    attempt = start()
    save(tmp_path / "run", 3)  # 6 was damaged: what --ckpt-fallback found
    assert end(attempt, 1, was_stopped=False) == GO_ON
    assert end(start(), 1, was_stopped=False) == FAILED


def test_a_failure_without_a_newer_checkpoint_is_final(start, tmp_path):
    save(tmp_path / "run", 3)
    assert end(start(), 1, was_stopped=False) == FAILED


def test_a_failure_shows_the_first_error_of_each_kind(start, capsys, monkeypatch):
    listed = Path.glob  # in an order that is the file system's own affair
    monkeypatch.setattr(Path, "glob", lambda *of: sorted(listed(*of), reverse=True))
    attempt = start()
    (attempt / "rank-001.log").write_text("Traceback\n[rank1]: ValueError: lr is -1\nlater\n")
    (attempt / "rank-000.log").write_text("RuntimeError: Connection closed by peer\n")
    (attempt / "rank-002.log").write_text("[rank2]: ValueError: lr is -1\n")
    (attempt / "rank-003.log").write_text("pretrain.py: error: unrecognized arguments: --x\n")
    (attempt / "rank-004.log").write_text("warning\nerror: there is no flag --y\n")
    for log in attempt.glob("rank-*.log"):
        os.utime(log, (1, 1))  # at once, as far as the file system can tell
    end(attempt, 1, was_stopped=False)
    told = capsys.readouterr().out
    assert "rank-001.log: ValueError: lr is -1" in told
    assert "rank-000.log: RuntimeError: Connection closed" in told
    assert "rank-002" not in told and "unrecognized arguments: --x" in told
    assert "rank-004.log: error: there is no flag --y" in told


REFUSAL = "> a note\nerror: --lr is -1: use at least 0.\n"


def test_a_refused_attempt_leaves_its_words_and_nothing_else(start, tmp_path, capsys):
    attempt = start()
    (attempt / "rank-000.log").write_text(REFUSAL)
    assert end(attempt, REFUSED, was_stopped=False) == REFUSED
    said = capsys.readouterr()
    assert said.err.endswith("\nerror: --lr is -1: use at least 0.\n") and not said.out
    assert not list(tmp_path.iterdir())


def test_a_refused_attempt_gives_back_what_was_there_before(start, tmp_path):
    earlier, events = start(), tmp_path / "run" / "tensorboard"
    events.mkdir()
    attempt = start()
    (attempt / "rank-000.log").write_text(REFUSAL)
    assert not events.exists()
    assert end(attempt, REFUSED, was_stopped=False) == REFUSED
    assert events.exists() and earlier.exists() and not attempt.exists()


@pytest.mark.parametrize(
    ("status", "log"),
    [(1, REFUSAL), (REFUSED, "bash: no such file\n"), (REFUSED, "ValueError: lr is -1\n")],
)
def test_only_what_was_refused_is_taken_back(start, status, log):
    attempt = start()
    (attempt / "rank-000.log").write_text(log)
    assert end(attempt, status, was_stopped=False) == FAILED
    assert attempt.exists()


def test_torchruns_word_that_a_child_failed_is_told_only_if_the_child_said_nothing(start, capsys):
    attempt = start()
    (attempt / "torchrun-000.log").write_text("torch.distributed.ChildFailedError: \n")
    end(attempt, 1, was_stopped=False)
    assert "torchrun-000.log: torch.distributed.ChildFailedError" in capsys.readouterr().out
    (attempt / "rank-000.log").write_text("ValueError: lr is -1\n")
    end(attempt, 1, was_stopped=False)
    told = capsys.readouterr().out
    assert "rank-000.log: ValueError: lr is -1" in told and "ChildFailedError" not in told


def test_a_finished_run_is_not_started_again_unless_it_is_to_go_further(start, tmp_path, capsys):
    attempt = start("--train-iters", "20")
    save(tmp_path / "run", 20)
    mark_finished(tmp_path / "run", 20, None)
    assert end(attempt, 0, was_stopped=True) == DONE
    assert "finished" in capsys.readouterr().out
    assert start("--train-iters", "20") is None
    assert start("--train-iters", "21") is not None
    assert not is_finished(tmp_path / "run", {"train-samples": ["160"]})
    assert not is_finished(tmp_path / "other", {})


def test_a_process_that_is_killed_while_it_marks_the_end_leaves_no_half_mark(tmp_path, monkeypatch):
    def killed(path, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        mark_finished(tmp_path, 20, None)
    assert not is_finished(tmp_path, {})
