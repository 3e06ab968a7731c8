"""``kill -9`` under the torchrun command itself: nothing is forked, nothing is imported before."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed.harness import DTOP_P, REPOSITORY, TINY

pytestmark = [pytest.mark.distributed, pytest.mark.megatron, pytest.mark.long]

PATIENCE, BOUND = 240, 60  # seconds until the training is under way, and until all have ended
FLAGS = (
    f"{TINY} {DTOP_P} --num-layers 2 --num-experts 4 --expert-model-parallel-size 2 "
    "--micro-batch-size 1 --train-iters 100000 --save-interval 100000 --split 1,0,0"
)


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[psutil.Popen]:
    """Torchrun with two ranks that have taken a few steps; ``log`` is beside."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "megatron_dynmoe.pretrain", *FLAGS.split()]
    command += ["--save", str(tmp_path / "checkpoints")]
    with open(tmp_path / "log", "w") as file:
        process = psutil.Popen(
            command,
            stdout=file,
            stderr=file,
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    end = time.monotonic() + PATIENCE
    while "iteration        3/" not in (log := (tmp_path / "log").read_text()):
        assert process.poll() is None and time.monotonic() < end, log[-3000:]
        time.sleep(0.1)
    ranks = process.children()
    yield process
    for left in [*ranks, process]:
        if left.is_running():
            left.kill()


def test_torchrun_ends_with_an_error_when_a_rank_is_killed(
    torchrun: psutil.Popen, tmp_path: Path
) -> None:
    ranks = torchrun.children()
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    assert torchrun.wait(BOUND) == 1
    assert psutil.wait_procs(ranks, BOUND)[1] == []
    log = (tmp_path / "log").read_text()
    assert "Signal 9 (SIGKILL)" in log


def test_ranks_end_when_torchrun_is_killed(torchrun: psutil.Popen) -> None:
    ranks = torchrun.children()
    torchrun.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(ranks, BOUND)[1] == []


@pytest.mark.parametrize("told", ["torchrun", "rank"])
def test_the_last_line_after_a_signal_says_how_to_go_on(
    torchrun: psutil.Popen, tmp_path: Path, told: str
) -> None:
    if told == "torchrun":
        torchrun.send_signal(signal.SIGINT)
    else:
        torchrun.children()[1].send_signal(signal.SIGINT)
    assert torchrun.wait(BOUND) == 1
    log = (tmp_path / "log").read_text()
    start = "> " if told == "torchrun" else r"torchrun: rank \d ended with exit code 130: "
    save = re.escape(str(tmp_path / "checkpoints"))
    assert re.fullmatch(
        rf"{start}stopped by SIGINT: iteration (\d+) of 100000; its checkpoints are in {save}, "
        rf"last checkpoint: \1; to go on: the same command with --load {save}",
        log.strip().splitlines()[-1],
    ), log[-3000:]
    assert "Traceback" not in log
