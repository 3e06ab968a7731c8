"""The quickstart, cut short: what a newcomer types, start to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.distributed, pytest.mark.megatron, pytest.mark.slow]


def quickstart(run, *arguments, **settings):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUN": str(run),
        "STEPS": "6",
        **settings,
    }
    return subprocess.run(
        ["bash", "examples/quickstart.sh", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_quickstart_trains_and_reports(tmp_path):
    run = tmp_path / "run"
    result = quickstart(run, NPROC="2")
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["routing"] == "dtop_p"
    assert summary["target_experts_per_token"] == 2
    assert 1 < summary["mean_experts_per_token"] < 4
    assert summary["std_experts_per_token"] > 0
    assert summary["iterations"] == 6
    assert summary["last_loss"] < summary["first_loss"] - 0.2
    assert 8 < summary["first_loss"] < 8.7  # ln 4096 = 8.3: an untrained model knows nothing
    assert summary["validation_loss"] < summary["first_loss"]
    assert summary["tokens_per_second"] > 0 and summary["wall_seconds"] > 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    latest = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert latest.read_text().strip() == "6"
    assert "--moe-dynamic-target-experts-per-token 2" in (run / "command.txt").read_text()
    assert "initial_threshold: 0.33" in (run / "resolved.yaml").read_text()
    assert "step 6/6 | loss" in result.stdout and '"mean_experts_per_token"' in result.stdout

    # Another run in the same folder would mix the two: refused, nothing is written.
    command = (run / "command.txt").read_text().split()
    module = command[command.index("-m") :]
    again = subprocess.run(
        [sys.executable, *module, "--expert-model-parallel-size", "1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert again.returncode != 0
    assert f"--run-dir is {run}, which holds a run" in again.stderr
    assert json.loads((run / "summary.json").read_text()) == summary

    # A mistake in a second run: a plain answer, and the first run is kept.
    failed = quickstart(run, "--moe-expert-capacity-factor", "1.0", NPROC="1")
    assert failed.returncode != 0
    assert "--moe-expert-capacity-factor is 1.0" in failed.stderr
    assert "Remedy" in failed.stderr
    assert "is kept as" in failed.stdout
    (kept,) = tmp_path.glob("run-*")
    assert json.loads((kept / "summary.json").read_text()) == summary
