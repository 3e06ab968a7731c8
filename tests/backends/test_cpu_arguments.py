"""What only CUDA has, and what names it."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dynmoe.backends import cpu

REPOSITORY = Path(__file__).resolve().parents[2]
UNUSED = {"cuda_graph_impl": "none", "enable_cuda_graph": False}
# True on the CPU layer, if x is a tensor and context() a context of a device.
REDIRECTED = (
    *(f"torch.{make}, device='cuda', pin_memory=True).is_cpu" for make in ("ones(2", "empty((2,)")),
    *(f"torch.{make}, device='cuda').is_cpu" for make in ("tensor(2", "as_tensor(2", "randperm(2")),
    "torch.zeros_like(x, device=torch.device('cuda', 0)).is_cpu",
    "x.new_tensor([2], device='cuda:0').is_cpu and x.new_zeros(2, device='cuda').is_cpu",
    "x.to('cuda') is x and x.to(device='cuda') is x and x.cuda() is x and x.pin_memory() is x",
    "x.to('cuda', torch.float64).dtype == torch.float64 and x.to('meta').is_meta",
    "x.type() == 'torch.cuda.FloatTensor' and x.type(torch.float64).dtype == torch.float64",
    "x.record_stream(torch.cuda.current_stream()) is None",
    "torch.nn.Linear(2, 2, device='cuda').to('cuda').weight.is_cpu",
    "inside('cuda', lambda: torch.zeros(2)).is_cpu",
    "inside('meta', lambda: torch.nn.Linear(2, 2).weight).is_meta",
    "torch.zeros is not torch.ones and torch.zeros.__name__ == 'zeros'",
    # a data loader's draws: not from the model's generator
    "same(torch.cuda.get_rng_state, lambda: torch.empty(2).random_())",
    "not same(torch.get_rng_state, lambda: torch.empty(2).random_())",
    "same(torch.get_rng_state, lambda: torch.rand(2, device='cuda'))",
)


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
    """What an import of Megatron prints if Transformer Engine and Apex's extension are there."""
    code = (
        "from megatron_dynmoe.backends import cpu; cpu.install(); import megatron.training\n"
        "from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER\n"
        "from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available\n"
        "from megatron_dynmoe.backends.choice import has_transformer_engine\n"
        "print(USING_PYTORCH_OPTIMIZER, _grad_accum_fusion_available, has_transformer_engine())\n"
        "import torch; x = torch.ones(2)\n"
        "def inside(device, make):\n"
        "    with torch.device(device): return make()\n"
        "def same(state, call):\n"
        "    before = state().clone(); call(); return torch.equal(state(), before)\n"
        f"print([each for each in {REDIRECTED!r} if not eval(each)])\n"
        "import torch._dynamo"  # it refuses one function under two names
    )
    variables = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests/doubles'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_nothing_is_said_of_what_is_for_gpus(imported):
    """Upstream warns nine times while it is imported, which buries the first words of a run."""
    assert imported.stderr.startswith("> megatron_dynmoe: running Megatron on the CPU over gloo")
    assert imported.stderr.count("\n") == 1


@pytest.mark.slow
def test_packages_for_cuda_are_as_if_they_were_not_installed(imported):
    """Megatron would take layers and optimizers from them, which stop at tensors of a CPU."""
    assert imported.stdout.split()[:3] == ["True", "False", "False"]


@pytest.mark.slow
def test_what_names_cuda_happens_on_the_cpu(imported):
    assert imported.stdout.splitlines()[1:] == ["[]"]
