"""A real study, tiny: stopped by SIGTERM it saves, and goes on where it was."""

import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from study import fingerprint, queue, runs
from study.corpus import Corpus
from study.variants import SIZES, VARIANTS

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds for a command, on a busy machine


def study(folder, *flags):
    command = [sys.executable, "-m", "study", "--quick", "--only", "dtop_p", "--tokens-scale", "5"]
    return subprocess.Popen(
        [*command, "--text", str(folder / "book.jsonl.gz"), "--runs", str(folder), *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.distributed
@pytest.mark.megatron
@pytest.mark.long
def test_a_stopped_study_goes_on_and_a_finished_one_trains_nothing(tmp_path):
    with (
        gzip.open(ROOT / "examples" / "data" / "book.jsonl.gz", "rt") as whole,
        gzip.open(tmp_path / "book.jsonl.gz", "wt") as part,
    ):
        part.writelines(itertools.islice(whole, 20))

    with study(tmp_path) as first:
        seen = []
        for line in first.stdout:
            seen.append(line)
            if line.endswith("starting\n"):
                busy, _ = study(tmp_path).communicate(timeout=PATIENCE)
            if re.search(r"step +7/60", line):
                first.send_signal(signal.SIGTERM)
    assert first.returncode == 128 + signal.SIGTERM, "".join(seen)
    assert "another study runs in" in busy
    assert "stopped. The same command goes on." in seen[-1]
    (folder,) = tmp_path.glob("dtop_p-seed1-*")
    saved = int((folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 7 <= saved < 60 and not (folder / "finished.json").exists()

    said, _ = (second := study(tmp_path)).communicate(timeout=PATIENCE)
    assert second.returncode == 0, said
    assert f"going on from step {saved}" in said and "finished. Study: 1 of 1 runs" in said
    content = json.loads((tmp_path / "results" / "quick.json").read_text())
    (row,) = content["runs"]
    assert row["steps"] == 60 and row["tokens"] == 60 * 512
    assert row["commit"] == fingerprint.commit()
    assert 0 < row["processor_seconds_per_step"] < 10
    assert content["analysis"][0]["experts_by_source"].keys() == {"book"}

    said, _ = (third := study(tmp_path)).communicate(timeout=PATIENCE)
    assert third.returncode == 0 and "dtop_p-seed1  " not in said, said


def named(name, folder):
    return runs.Run(VARIANTS[name], 1, {}, folder / name, SIZES["quick"])


def script(text):
    def start(run, corpus):
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / runs.ERRORS, "a") as errors:
            return subprocess.Popen(
                [sys.executable, "-c", text, str(run.folder)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    return start


def test_one_failure_is_named_and_the_others_are_trained(tmp_path, monkeypatch, capsys):
    text = (
        "import sys, pathlib; folder = pathlib.Path(sys.argv[1])\n"
        "print(' iteration 12/ 12 | lm loss: 5.0 |', flush=True)\n"
        "if 'top1' in folder.name: raise ValueError('out of luck')\n"
        "(folder / 'finished.json').touch()"
    )
    monkeypatch.setattr(queue, "start", script(text))
    planned = [named(name, tmp_path) for name in ("top2", "top1", "dtop_p")]
    corpus = Corpus("text", [], tmp_path)
    trained = queue.Queue(planned, corpus, 2)
    trained.train()
    (failure,) = trained.failures
    assert "top1-seed1: exit code 1: ValueError: out of luck" in failure
    assert (tmp_path / "top2" / runs.TIMES).is_file()
    assert not (tmp_path / "top1" / runs.TIMES).exists()
    said = capsys.readouterr().out
    assert said.count("finished. Study:") == 2 and "Study: 2 of 3 runs" in said

    monkeypatch.setattr(queue, "start", script(text.replace("top1", "none")))
    again = queue.Queue(planned, corpus, 2)
    again.train()
    said = capsys.readouterr().out
    assert not again.failures and "top2-seed1" not in said and "Study: 3 of 3 runs" in said


def test_ctrl_c_starts_nothing_more_and_reaches_the_running_ones(tmp_path, monkeypatch):
    text = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(queue, "start", script(text))
    planned = [named(name, tmp_path) for name in ("top2", "top1")]
    before = signal.getsignal(signal.SIGINT)
    stopped = queue.Queue(planned, Corpus("text", [], tmp_path), 1)
    stopped.train()
    assert stopped.stopped_by == signal.SIGINT and not stopped.failures
    assert not (tmp_path / "top1").exists()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("same, saves", [(600, True), (0, False)])
def test_a_second_signal_ends_at_once_and_an_echo_does_not(tmp_path, monkeypatch, same, saves):
    """``kill %1`` reaches the study twice: with its group, and passed on by make."""
    text = (
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n"
        f"    time.sleep({0.5 if saves else 600})\n"
        "    pathlib.Path(sys.argv[1], 'saved').touch()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(600)"
    )
    monkeypatch.setattr(queue, "start", script(text))
    monkeypatch.setattr(queue, "SAME_SIGNAL", same)  # seconds; none of them is waited for
    run = named("top2", tmp_path)
    stopped = queue.Queue([run], Corpus("text", [], tmp_path), 1)

    def echo():
        while stopped.stopped_by is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    echoing = threading.Thread(target=echo)
    echoing.start()
    stopped.train()
    echoing.join()
    assert (run.folder / "saved").exists() == saves
