"""launch/local.sh: SIGTERM ends a run with a checkpoint, and the same command goes on with it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_dynmoe.jobs.attempts import latest_iteration

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "local.sh"
# So many that the signal comes before the last one, and seconds, on a busy machine.
STEPS, PATIENCE = 60, 300


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "cluster.env").write_text("DEVICE=cpu")
    environment = os.environ | {"CLUSTER_ENV": str(tmp_path / "cluster.env"), "NPROC": "1"}
    run_dir = tmp_path / "a run"  # a space, as users have them
    command = [
        "bash",
        str(SCRIPT),
        "smoke",
        "--train-iters",
        str(STEPS),
        "--global-batch-size",
        "2",
    ]
    command += ["--save-interval", "1000", "--run-dir", str(run_dir)]

    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    log = run_dir / "attempts" / "0001" / "rank-000.log"
    end = time.monotonic() + PATIENCE
    while not log.exists() or f"iteration {2:8d}/" not in log.read_text():
        assert time.monotonic() < end and first.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    told, _ = first.communicate(timeout=PATIENCE)
    reached = latest_iteration(run_dir, {})
    assert first.returncode == 128 + signal.SIGTERM  # what waits for its success must not start
    assert f"stopped before its end: {run_dir} (checkpoint {reached})" in told
    assert reached is not None and 2 <= reached < STEPS

    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"attempt 2 of {run_dir}: from iteration {reached}, 1 process" in second.stderr
    assert f"step {STEPS}/{STEPS}" in second.stdout  # the progress of the last rank
    assert f"finished: {run_dir} (checkpoint {STEPS})" in second.stdout
