"""The processes that load data hear SIGTERM as the rank does that started them, and end with it."""

from pathlib import Path

import pytest

from tests.distributed.harness import DTOP_P, TINY
from tests.faults.launching import ONE_BY_ONE, PATIENCE, start

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

FLAGS = f"{TINY} {DTOP_P} --num-layers 2 --num-experts 4 --split 1,0,0 --num-workers 2"


def test_a_run_that_stops_early_does_not_wait_for_them(tmp_path: Path) -> None:
    words = f"{FLAGS} --exit-interval 2".split()
    attempt = start(ONE_BY_ONE, 1, words, tmp_path / "attempt")
    attempt.wait_until_all_have_ended(PATIENCE / 2)
    assert attempt.exit_codes() == [0], attempt.log()
