"""docs/train.md: its commands work as they stand, and its flags exist."""

import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from megatron_dynmoe.jobs.recipes import recipe_flags
from megatron_dynmoe.settings.messages.words import values_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/train.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PATIENCE = 900  # seconds for all commands: a calm machine takes 90

# Of tools and scripts, which are not the training's.
OTHERS = {
    *("--input", "--vocab-size", "--output", "--output-prefix", "--append-eod", "--model"),
    *("--prompt", "--max-new-tokens", "--temperature", "--gpus", "--gpu"),
    *("--standalone", "--nproc-per-node"),
}


@pytest.fixture(scope="module")
def parser():
    from megatron.training.arguments import add_megatron_arguments

    from megatron_dynmoe.training.flags import add_flags

    return add_flags(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


@pytest.fixture
def flags(tmp_path):
    """The words of the page's file of flags."""
    (text,) = re.findall(r"<<'END'\n(.*?)^END$", "".join(COMMANDS), re.MULTILINE | re.DOTALL)
    (tmp_path / "my.flags").write_text(text)
    return recipe_flags(tmp_path / "my.flags")


@pytest.mark.megatron
def test_the_flags_exist(parser, flags):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE))
    assert len(named) > 50
    assert named - OTHERS - set(parser._option_string_actions) == set()
    parser.parse_args(flags)


def test_each_flag_of_the_file_is_explained(flags):
    rows = re.findall(r"^\| (`--.*?) \|", PAGE, re.MULTILINE)
    explained = set(re.findall(r"--[\w-]+", " ".join(rows)))
    assert {f"--{name}" for name in values_of(flags)} <= explained


@pytest.mark.megatron
@pytest.mark.distributed
@pytest.mark.slow
def test_the_commands_work_from_first_to_last(tmp_path):
    """Cut short, in a folder that looks like the checkout."""
    for name in ("tools", "launch", "examples", "megatron_dynmoe"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "".join(COMMANDS)
    for long, short in {
        "--train-iters 300": "--train-iters 4",
        "--train-iters 400": "--train-iters 6",
        "--lr-warmup-iters 30": "--lr-warmup-iters 1",
        "--eval-iters 8": "--eval-iters 1",
        "--seq-length 256": "--seq-length 64",
        "--max-position-embeddings 256": "--max-position-embeddings 64",
        "--max-new-tokens 40": "--max-new-tokens 4",
    }.items():
        assert long in script
        script = script.replace(long, short)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CLUSTER_ENV": "/dev/null",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment | {"NPROC": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert "finished: runs/mine (checkpoint 4)" in done.stdout
    assert "finished: runs/mine (checkpoint 6)" in done.stdout
    assert "on 1 x H100" in done.stdout  # the plan
    assert "It is a truth" in re.sub(r"\[[\d.]+\]", "", done.stdout)
    for run, steps in {"mine": 6, "raw": 4}.items():
        summary = json.loads((tmp_path / "runs" / run / "summary.json").read_text())
        assert summary["iterations"] == steps and summary["validation_loss"] > 0
