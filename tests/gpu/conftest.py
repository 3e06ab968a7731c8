"""What the tests of a GPU share. Without one they run on the CPU: see :mod:`tests.gpu.stand_in`."""

import contextlib
import functools
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.stand_in import ON_GPU, take_the_ways_of_cuda
from tests.moe import one_rank


@pytest.fixture(autouse=True)
def world_of_one(monkeypatch):
    """Real Megatron on one rank."""
    if ON_GPU:
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        _initialize_nccl()
        model_parallel_cuda_manual_seed(1)
    else:
        one_rank.world_of_one()
        take_the_ways_of_cuda(monkeypatch.setattr)
    yield
    one_rank.forget_global_state()


@functools.cache
def _initialize_nccl() -> None:
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


@pytest.fixture(params=["0", "1", "fused"], ids=["plain", "kernels", "fused"])
def setting(request, monkeypatch) -> str:
    """All values of DYNMOE_KERNELS."""
    if request.param != "0":
        pytest.importorskip("triton")
    monkeypatch.setenv("DYNMOE_KERNELS", request.param)
    return request.param


@pytest.fixture
def never_waiting():
    """A context in which CUDA refuses whatever makes the host wait for the device."""
    return _never_waiting


@contextlib.contextmanager
def _never_waiting() -> Iterator[None]:
    if not ON_GPU:  # tests/moe/test_row_buffer.py counts the waits there
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def poisoned_memory():
    """A context in which new memory holds NaN until something writes to it."""
    return _poisoned_memory


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    # PyTorch fills empty tensors with NaN if it is to be deterministic; its own outputs, too.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
