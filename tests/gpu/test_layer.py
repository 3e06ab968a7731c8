"""A whole MoE layer of ours on a GPU, in a world of one."""

import pytest
import torch

from megatron_dynmoe.moe.experts import has_grouped_gemm
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank

pytestmark = [pytest.mark.gpu, pytest.mark.megatron]

E, S, B, D, FFN, CAP = 16, 64, 2, 64, 128, 6
BF16 = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def layer_of(**settings):
    dynmoe = DynMoEConfig(
        routing="dtop_p",
        target_experts_per_token=2,
        max_experts_per_token=CAP,
        backend="torch_native",
        **settings,
    )
    torch.manual_seed(0)
    layer = one_rank.moe_layer(
        dynmoe, num_experts=E, hidden_size=D, moe_ffn_hidden_size=FFN, params_dtype=BF16, bf16=True
    )
    return layer.cuda()


def one_step(layer) -> dict[str, torch.Tensor]:
    hidden = torch.randn(S, B, D, generator=torch.Generator().manual_seed(1))
    hidden = hidden.to("cuda", BF16).requires_grad_()
    torch.cuda.synchronize()
    output, _ = layer(hidden)
    output.float().square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": output, "hidden": hidden.grad} | gradients


def test_with_room_for_the_worst_case_the_host_never_waits():
    if not has_grouped_gemm(torch.device("cuda"), BF16, D, FFN):
        pytest.skip("no grouped GEMM here: it needs Hopper or later, or DYNMOE_KERNELS=1")
    layer = layer_of(row_buffer="worst_case")
    one_step(layer)  # kernels are compiled, memory is taken
    layer.zero_grad(set_to_none=True)
    hidden = torch.randn(S, B, D, device="cuda", dtype=BF16, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = layer(hidden)
        output.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_room_for_the_worst_case_changes_no_result():
    if not has_grouped_gemm(torch.device("cuda"), BF16, D, FFN):
        pytest.skip("no grouped GEMM here: it needs Hopper or later, or DYNMOE_KERNELS=1")
    measured, worst_case = one_step(layer_of()), one_step(layer_of(row_buffer="worst_case"))
    assert measured.keys() == worst_case.keys()
    for name, want in measured.items():
        torch.testing.assert_close(worst_case[name], want, msg=lambda m, n=name: f"{n}: {m}")


def test_steps_repeat_bitwise():
    one, other = one_step(layer_of()), one_step(layer_of())
    for name, want in one.items():
        assert torch.equal(other[name], want), name
