"""What only CUDA has."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dynmoe.backends import cpu

REPOSITORY = Path(__file__).resolve().parents[2]
UNUSED = {"cuda_graph_impl": "none", "enable_cuda_graph": False}


@pytest.mark.parametrize("used", [{"cuda_graph_impl": "local"}, {"enable_cuda_graph": True}])
def test_cuda_graphs_are_refused(used):
    """Also with stock top-k: Megatron ends in an AttributeError of a generator."""
    (flag,) = used
    cpu.refuse_what_needs_a_gpu(Namespace(**UNUSED))
    with pytest.raises(ValueError, match=f"^--{flag.replace('_', '-')} is .* Leave it out"):
        cpu.refuse_what_needs_a_gpu(Namespace(**UNUSED | used))


def test_a_profiler_of_cuda_is_refused():
    with pytest.raises(ValueError, match=r"^--profile is given on the CPU.*Leave it out"):
        cpu.refuse_what_needs_a_gpu(Namespace(**UNUSED, profile=True))
    cpu.refuse_what_needs_a_gpu(Namespace(**UNUSED, profile=True, use_pytorch_profiler=True))


@pytest.fixture(scope="module")
def imported():
    """What an import of Megatron prints where Transformer Engine and Apex's extension are."""
    code = (
        "from megatron_dynmoe.backends import cpu; cpu.install(); import megatron.training\n"
        "from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER\n"
        "from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available\n"
        "from megatron_dynmoe.backends.choice import has_transformer_engine\n"
        "print(USING_PYTORCH_OPTIMIZER, _grad_accum_fusion_available, has_transformer_engine())"
    )
    variables = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests/doubles'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done


def test_nothing_is_said_of_what_is_for_gpus(imported):
    """Upstream warns nine times while it is imported, which buries the first words of a run."""
    assert imported.stderr.startswith("> megatron_dynmoe: running Megatron on the CPU over gloo")
    assert imported.stderr.count("\n") == 1


def test_packages_for_cuda_are_as_if_they_were_not_installed(imported):
    """Megatron would take layers and optimizers from them, which stop at tensors of a CPU."""
    assert imported.stdout.split() == ["True", "False", "False"]
