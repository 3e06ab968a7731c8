"""Kernels compile for GPUs, also if there is none."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.triton
@pytest.mark.parametrize(
    "words", [["quick"], pytest.param([], marks=pytest.mark.long)], ids=["one of each", "all"]
)
def test_every_kernel_compiles_for_ampere_hopper_and_blackwell_and_spills_nothing(words):
    # In a process of its own, because here Triton interprets.
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpus", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled == {
        *("_multiply_rows", "_multiply_by_rows", "_sum_rows", "_count_chosen", "_number_rows"),
        *("_gate_and_up", "_gate_and_up_backward"),
        *("_rotate", "_forward", "_add_up_parts", "_backward"),
    }
