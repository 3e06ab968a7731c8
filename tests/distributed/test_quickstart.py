"""The quickstart, cut short: what a newcomer types, start to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 900  # seconds for a command: a calm machine takes 40

# Shorter rows, and less of what is held out: a step takes a quarter of the time.
SHORT = (
    *("--seq-length", "128", "--max-position-embeddings", "128"),
    *("--eval-iters", "1"),
)

pytestmark = [pytest.mark.distributed, pytest.mark.megatron, pytest.mark.slow]


def example(script, run, *arguments, **settings):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUN": str(run),
        "STEPS": "6",
        **settings,
    }
    return subprocess.run(
        ["bash", f"examples/{script}", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a quickstart of 6 steps, and what it printed."""
    run = tmp_path_factory.mktemp("quickstart") / "run"
    result = example("quickstart.sh", run, *SHORT, NPROC="2")
    assert result.returncode == 0, result.stdout + result.stderr
    return run, result


def test_quickstart_trains_and_reports(trained):
    run, result = trained
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
    assert result.stdout.count("--override-opt-param-scheduler") == 1  # how to train on, once

    # Another run in the same folder would mix the two: refused, nothing is written.
    command = (run / "command.txt").read_text().split()
    module = command[command.index("-m") :]
    again = subprocess.run(
        [sys.executable, *module, "--expert-model-parallel-size", "1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert again.returncode != 0
    assert f"--run-dir is {run}, which holds a run" in again.stderr
    assert json.loads((run / "summary.json").read_text()) == summary


def test_export_and_generate_ends_in_text(trained):
    run, _ = trained
    result = example(
        "export_and_generate/run.sh", run, "--experts", "digits", PROMPT="It is a truth"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    exported = run / "huggingface"
    config = json.loads((exported / "config.json").read_text())
    assert config["routing"] == "dtop_p" and len(config["threshold"]) == 6
    card = (exported / "README.md").read_text()
    assert "| steps | 6 |" in card and "book_text_document, code_text_document" in card
    assert "Measured experts per token" in card and "huang2024harder" in card
    assert {"tokenizer.json", "generation_config.json", "manifest.json"} <= {
        path.name for path in exported.iterdir()
    }
    assert "<- target 2" in result.stdout
    assert "experts per token" in result.stdout and "truth" in result.stdout


def test_a_mistake_gets_a_plain_answer_and_the_first_run_is_kept(trained):
    """Last in this file: it moves the run."""
    run, _ = trained
    summary = json.loads((run / "summary.json").read_text())
    failed = example("quickstart.sh", run, "--moe-expert-capacity-factor", "1.0", NPROC="1")
    assert failed.returncode != 0
    assert "--moe-expert-capacity-factor is 1.0" in failed.stderr
    assert "Remedy" in failed.stderr
    assert "is kept as" in failed.stdout
    (kept,) = run.parent.glob("run-*")
    assert json.loads((kept / "summary.json").read_text()) == summary
