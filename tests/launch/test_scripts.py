"""The launch scripts up to the point where they would start a job: settings and plain mistakes."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("pretrain_*.sh"))


@pytest.fixture
def bash(tmp_path):
    """Runs a script of launch/ with a cluster's settings, and an sbatch that says what it got."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text('#!/usr/bin/env bash\necho "sbatch $* in ${SBATCH_PARTITION:-none}"\n')
    sbatch.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment = kept | {"PATH": f"{sbatch.parent}:{os.environ['PATH']}"}

    def run(script: str, *arguments: str, settings: str | None = "DEVICE=cpu\nPARSE_FLAGS=no"):
        file = tmp_path / "cluster.env"
        if settings is not None:
            file.write_text(f"{settings}\nRUNS={tmp_path}/runs\n")
        return subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            env=environment | {"CLUSTER_ENV": str(file)},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    return run


def submit(bash, *arguments: str, settings: str = "DEVICE=cpu"):
    return bash("submit.sh", *arguments, settings=f"{settings}\nPARSE_FLAGS=no")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_needs_the_clusters_settings(bash, script):
    answer = bash(script, settings=None)
    assert answer.returncode == 2
    assert "cp " in answer.stderr and "cluster.env.example" in answer.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_slurm_did_not_start_says_how_to_submit_it(bash, script):
    answer = bash(script)
    assert answer.returncode == 2
    assert "launch/submit.sh" in answer.stderr and "launch/local.sh" in answer.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_default_recipe_fits_one_node_of_eight(bash, script):
    answer = submit(bash, "--ntasks-per-node", "8", str(LAUNCH / script), "--mock-data")
    assert answer.returncode == 0, answer.stderr
    assert f"sbatch --ntasks-per-node 8 {LAUNCH / script} --mock-data" in answer.stdout


def test_the_example_of_settings_is_read(bash):
    example = (LAUNCH / "cluster.env.example").read_text()
    answer = submit(bash, str(LAUNCH / "pretrain_dense.sh"), "smoke", settings=example)
    assert answer.returncode == 0, answer.stderr


def test_submitting_uses_the_clusters_settings(bash):
    settings = (
        "export SBATCH_PARTITION=fast SBATCH_GPUS_PER_NODE=a800:8\n"
        "DATA_FLAGS=(--data-path '/no where/text' --tokenizer-model /nowhere)"
    )
    script = str(LAUNCH / "pretrain_dtop_p.sh")
    answer = submit(bash, "-N", "2", script, "smoke", "--micro-batch-size", "2", settings=settings)
    assert "--micro-batch-size 2 times 16 data-parallel ranks" in answer.stderr
    answer = submit(bash, "--nodes=1", script, "smoke", settings=settings)
    assert f"sbatch --nodes=1 {script} smoke in fast" in answer.stdout
    answer = submit(bash, script, "dtop_p_16e", settings=settings)
    assert "no file /no where/text.bin" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrain_dtop_p.sh smokey", "did you mean smoke?"),
        ("-N3 pretrain_dtop_p.sh", "processes is 3"),
        ("--nodes=2 pretrain_dtop_p.sh", "there is no data"),
        ("--nodes=3 pretrain_dtop_p.sh --mock-data", "pipeline 2"),
        ("--nodes 2 pretrain_dtop_p.sh smoke --expert-model-parallel-size 3", "--num-experts is 8"),
        ("-N 16 pretrain_dtop_p.sh smoke", "--global-batch-size is 8"),
        (
            "--nodes 5 pretrain_dtop_p.sh smoke --pipeline-model-parallel-size 5",
            "--num-layers is 4",
        ),
        ("--nodes two pretrain_dtop_p.sh smoke", "--nodes is 'two'"),
        ("--nodes 2", "name a script"),
    ],
)
def test_a_mistake_is_found_before_the_job_is_submitted(bash, arguments, message):
    words = [str(LAUNCH / word) if word.endswith(".sh") else word for word in arguments.split()]
    answer = submit(bash, *words)
    assert answer.returncode != 0
    assert answer.stderr.startswith("error: ") and message in answer.stderr
    assert "Traceback" not in answer.stderr and "sbatch" not in answer.stdout


def test_a_misspelt_flag_is_found_before_the_job_is_submitted(bash):
    script, settings = str(LAUNCH / "pretrain_dtop_p.sh"), "DEVICE=cpu"
    answer = bash("submit.sh", script, "smoke", "--clip-grads", "1", settings=settings)
    assert answer.returncode == 1 and "sbatch" not in answer.stdout
    assert "error: there is no flag --clip-grads: did you mean --clip-grad?" in answer.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("LAUNCHER=mpirun", "LAUNCHER is 'mpirun'"),
        ("DEVICE=tpu", "DEVICE is 'tpu'"),
    ],
)
def test_a_bad_setting_is_named(bash, settings, message):
    answer = submit(bash, str(LAUNCH / "pretrain_dtop_p.sh"), "smoke", settings=settings)
    assert answer.returncode == 2 and message in answer.stderr


def test_the_local_script_names_what_is_missing(bash):
    answer = bash("local.sh", "dtop_p_16e", settings=None)  # it needs no cluster's settings
    assert answer.returncode == 1
    assert "error: the number of processes is 1, which tensor 1 x pipeline 2" in answer.stderr
    assert "name a recipe" in bash("local.sh").stderr
