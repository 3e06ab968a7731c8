"""What a refusal looks like where the entry point was started."""

import os
import subprocess
import sys

import pytest

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
    assert done.returncode == 1
    lines = [line.strip("= ") for line in done.stderr.splitlines()]
    last = [line for line in lines if line][-1]
    assert "ValueError: DYNMOE_DEVICE is 'cuda', but torch finds no CUDA device" in last
    assert "cpu.py" not in done.stderr, "a stack of ours buries the message"
