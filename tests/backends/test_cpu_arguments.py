"""What only CUDA has."""

import subprocess
import sys
from argparse import Namespace

import pytest

from megatron_dynmoe.backends import cpu

UNUSED = {"cuda_graph_impl": "none", "enable_cuda_graph": False}


@pytest.mark.parametrize("used", [{"cuda_graph_impl": "local"}, {"enable_cuda_graph": True}])
def test_cuda_graphs_are_refused(used):
    """Also with stock top-k: Megatron ends in an AttributeError of a generator."""
    (flag,) = used
    cpu._refuse_what_needs_a_gpu(Namespace(**UNUSED))
    with pytest.raises(ValueError, match=f"^--{flag.replace('_', '-')} is .* Leave it out"):
        cpu._refuse_what_needs_a_gpu(Namespace(**UNUSED | used))


def test_a_profiler_of_cuda_is_refused():
    with pytest.raises(ValueError, match=r"^--profile is given on the CPU.*Leave it out"):
        cpu._refuse_what_needs_a_gpu(Namespace(**UNUSED, profile=True))
    cpu._refuse_what_needs_a_gpu(Namespace(**UNUSED, profile=True, use_pytorch_profiler=True))


def test_nothing_is_said_of_what_is_for_gpus():
    """Upstream warns nine times while it is imported, which buries the first words of a run."""
    code = "from megatron_dynmoe.backends import cpu; cpu.install(); import megatron.training"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert done.stderr.startswith("> megatron_dynmoe: running Megatron on the CPU over gloo")
    assert done.stderr.count("\n") == 1
