"""The processes that load data hear SIGTERM as the rank does that started them, and end with it."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.harness import DTOP_P, TINY
from tests.faults.launching import CONTEXT, ONE_BY_ONE, PATIENCE, start

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

FLAGS = f"{TINY} {DTOP_P} --num-layers 2 --num-experts 4 --split 1,0,0 --num-workers 2"


def test_a_run_that_stops_early_does_not_wait_for_them(tmp_path: Path) -> None:
    words = f"{FLAGS} --exit-interval 2".split()
    attempt = start(ONE_BY_ONE, 1, words, tmp_path / "attempt")
    attempt.wait_until_all_have_ended(PATIENCE / 2)
    assert attempt.exit_codes() == [0], attempt.log()


def test_one_whose_rank_dies_before_it_looks_around_ends_too(tmp_path: Path) -> None:
    said = tmp_path / "said"
    rank = CONTEXT.Process(target=_start_one_and_die, args=(said,))
    rank.start()
    rank.join()
    assert rank.exitcode == -signal.SIGKILL
    end = time.monotonic() + PATIENCE
    while not said.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert said.read_text() == "alive: False"


def _start_one_and_die(said: Path) -> None:
    fork = multiprocessing.get_context("fork")
    fork.Process(target=_look_around_late, args=(said, os.getpid())).start()
    os.kill(os.getpid(), signal.SIGKILL)


def _look_around_late(said: Path, rank: int) -> None:
    from torch.utils.data._utils import worker

    while os.getppid() == rank:
        time.sleep(0.01)
    text = f"alive: {worker.ManagerWatchdog().is_alive()}"
    beside = said.with_suffix(".partial")
    beside.write_text(text)
    beside.rename(said)
