"""A whole MoE layer of ours, in a world of one, with kernels and without."""

import pytest
import torch

from megatron_dynmoe.moe import fused, grouped_linear
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.gpu.stand_in import ON_GPU
from tests.kernels.device import DEVICE
from tests.moe import one_rank

pytestmark = [pytest.mark.megatron, pytest.mark.triton]

E, S, B, D, FFN, CAP = (16, 64, 2, 64, 128, 6) if ON_GPU else (3, 5, 2, 16, 16, 2)
BF16, FP32 = torch.bfloat16, torch.float32
# Of the largest value of a tensor.
TOLERANCES = {BF16: 2e-2, FP32: 1e-5}

either_dtype = pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])


def layer_of(dtype: torch.dtype, fused_swiglu: bool = True, **settings):
    """A layer as in training, in which the activation is compiled."""
    dynmoe = DynMoEConfig(
        routing="dtop_p",
        target_experts_per_token=2,
        max_experts_per_token=CAP,
        backend="torch_native",
        **settings,
    )
    torch.manual_seed(0)
    layer = one_rank.moe_layer(
        dynmoe,
        num_experts=E,
        hidden_size=D,
        moe_ffn_hidden_size=FFN,
        params_dtype=dtype,
        bf16=dtype == BF16,
        bias_activation_fusion=fused_swiglu,
    )
    return layer.cuda()


def one_step(layer, tokens: int = S) -> dict[str, torch.Tensor]:
    """Output and all gradients, by name."""
    dtype = layer.config.params_dtype
    hidden = torch.randn(tokens, B, D, generator=torch.Generator().manual_seed(1))
    hidden = hidden.to(DEVICE, dtype).requires_grad_()
    layer.zero_grad(set_to_none=True)
    output, _ = layer(hidden)
    output.float().square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert {"router.weight", "experts.weight1", "experts.weight2"} <= gradients.keys()
    return {"output": output, "hidden": hidden.grad} | gradients


def assert_alike(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert expected.isfinite().all(), name
        tolerance = TOLERANCES[want["output"].dtype] * expected.abs().max().item()
        torch.testing.assert_close(
            got[name], expected, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def with_room(dtype: torch.dtype, room: str = "worst_case"):
    """A layer that does not count its rows; ``overflow`` has too little room for them."""
    sizes = torch.device(DEVICE), dtype, D, FFN
    if not (fused.is_fused(*sizes) or grouped_linear.uses_grouped_mm(*sizes)):
        pytest.skip("no grouped GEMM here: it needs Hopper or later, or DYNMOE_KERNELS=1")
    layer = layer_of(dtype, row_buffer="worst_case")
    if room == "overflow":
        layer.token_dispatcher.make_room(1.1, layer.router.counters)
    return layer


@either_dtype
def test_kernels_change_no_result(monkeypatch, dtype):
    pytest.importorskip("triton")
    results = []
    for setting in ("0", "1", "fused"):
        monkeypatch.setenv("DYNMOE_KERNELS", setting)
        results.append(one_step(layer_of(dtype)))
    for with_kernels in results[1:]:
        assert_alike(with_kernels, results[0])


@either_dtype
@pytest.mark.parametrize("setting", ["1", "fused"])
def test_experts_are_fused_if_asked_for_or_if_there_is_no_grouped_gemm(monkeypatch, dtype, setting):
    pytest.importorskip("triton")
    monkeypatch.setenv("DYNMOE_KERNELS", setting)
    layer = layer_of(dtype)
    one_step(layer)
    has_grouped_mm = grouped_linear.uses_grouped_mm(torch.device(DEVICE), dtype, D, FFN)
    is_fused = setting == "fused" or not has_grouped_mm
    assert layer.token_dispatcher.leaves_tokens == is_fused


@either_dtype
def test_the_compiled_activation_changes_no_result(dtype):
    fused, plain = layer_of(dtype), layer_of(dtype, fused_swiglu=False)
    for tokens in (S, S // 2, S + 3):  # compiled for one number of rows, then for any
        assert_alike(one_step(fused, tokens), one_step(plain, tokens))


@either_dtype
def test_room_for_the_worst_case_changes_no_result(setting, dtype):
    assert_alike(one_step(with_room(dtype)), one_step(layer_of(dtype)))


@pytest.mark.parametrize("room", ["measured", "worst_case", "overflow"])
@either_dtype
def test_no_result_depends_on_memory_that_nothing_wrote(setting, poisoned_memory, dtype, room):
    layer = layer_of(dtype) if room == "measured" else with_room(dtype, room)
    want = one_step(layer)
    with poisoned_memory():
        got = one_step(layer)
    assert_alike(got, want)


@pytest.mark.parametrize("room", ["worst_case", "overflow"])
@either_dtype
def test_the_host_never_waits_for_the_number_of_rows(setting, never_waiting, dtype, room):
    layer = with_room(dtype, room)
    one_step(layer)  # kernels are compiled, memory is taken
    layer.zero_grad(set_to_none=True)
    hidden = torch.randn(S, B, D, device=DEVICE, dtype=dtype, requires_grad=True)
    with never_waiting():
        output, _ = layer(hidden)
        output.sum().backward()


@either_dtype
def test_steps_repeat_bitwise(setting, dtype):
    one, other = one_step(layer_of(dtype)), one_step(layer_of(dtype))
    for name, want in one.items():
        assert torch.equal(other[name], want), name
