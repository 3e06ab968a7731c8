"""What only CUDA has."""

from argparse import Namespace

import pytest

from megatron_dynmoe.backends import cpu

UNUSED = {"cuda_graph_impl": "none", "enable_cuda_graph": False}


@pytest.mark.parametrize("used", [{"cuda_graph_impl": "local"}, {"enable_cuda_graph": True}])
def test_cuda_graphs_are_refused_on_the_cpu_alone(monkeypatch, used):
    """Also with stock top-k: Megatron ends in an AttributeError of a generator."""
    (flag,) = used
    monkeypatch.setattr(cpu, "is_installed", lambda: True)
    cpu.check_arguments(Namespace(**UNUSED))
    with pytest.raises(ValueError, match=f"^--{flag.replace('_', '-')} is .* leave it out"):
        cpu.check_arguments(Namespace(**UNUSED | used))
    monkeypatch.setattr(cpu, "is_installed", lambda: False)
    cpu.check_arguments(Namespace(**UNUSED | used))
