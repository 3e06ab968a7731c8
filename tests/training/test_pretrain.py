"""What a refusal looks like where the entry point was started."""

import os
import subprocess
import sys

import pytest

from megatron_dynmoe.storage.megatron_names import TRACKER
from tests.distributed.harness import DTOP_P, TINY

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["alone", "torchrun"])
def test_a_device_that_is_not_there_is_what_is_seen_last(launcher: tuple[str, ...]) -> None:
    environment = os.environ | {"DYNMOE_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "megatron_dynmoe.pretrain"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    lines = [line.strip("= ") for line in done.stderr.splitlines()]
    last = [line for line in lines if line][-1]
    seen = "torchrun: rank 0 ended with exit code 2: " if launcher else "error: "
    assert last.startswith(seen + "DYNMOE_DEVICE is 'cuda', but torch finds no CUDA device")
    assert "cpu.py" not in done.stderr, "a stack of ours buries the message"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("megatron_dynmoe.pretrain", "DYNMOE_KERNELS is '3': set 0 for plain PyTorch"),
        ("megatron_dynmoe.run", "usage: python -m megatron_dynmoe.run SCRIPT"),
        ("megatron_dynmoe.run gone.py", "megatron_dynmoe.run: there is no script at gone.py"),
    ],
)
def test_what_is_wrong_before_anything_is_imported_is_one_line_and_exit_code_2(words, says) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words.split()],
        env=os.environ | {"DYNMOE_KERNELS": "3"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {says}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("launcher", "words", "says"),
    [
        ((), "--hiden-size 32", "there is no flag --hiden-size: did you mean --hidden-size?"),
        (TORCHRUN, "--num-layers two", "--num-layers is 'two': give a whole number."),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line_and_exit_code_2(
    launcher, words, says
) -> None:
    command = [sys.executable, *launcher, "-m", "megatron_dynmoe.pretrain", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    speaker = "torchrun: rank 0 ended with exit code 2" if launcher else "error"
    assert done.stderr.strip().splitlines()[-1] == f"{speaker}: {says}"
    assert "usage:" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_start_leaves_nothing(tmp_path) -> None:
    flags = TINY.replace("--mock-data ", "") + f" {DTOP_P} --data-path {tmp_path / 'gone'}"
    command = [sys.executable, "-m", "megatron_dynmoe.pretrain", *flags.split()]
    command += ["--run-dir", str(tmp_path / "runs" / "mine"), "--split", "100,0,0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "--data-path" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "runs" / "mine").exists()


def test_a_start_that_fails_while_the_model_is_built_leaves_nothing(tmp_path) -> None:
    """Megatron finds out itself, after the settings have been written and the events opened."""
    flags = f"{TINY} {DTOP_P} --run-dir {tmp_path / 'run'} --pretrained-checkpoint {tmp_path}"
    (tmp_path / TRACKER).write_text("release")
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "metadata.json").write_text("{}")
    command = [sys.executable, "-m", "megatron_dynmoe.pretrain", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "time to initialize megatron" in done.stdout, "it was refused before"
    assert not (tmp_path / "run").exists()
