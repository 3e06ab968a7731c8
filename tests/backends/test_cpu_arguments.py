"""What only CUDA has."""

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
