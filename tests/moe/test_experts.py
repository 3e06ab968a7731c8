"""GroupedExperts against upstream's SequentialMLP from the same seed, and its two kinds of GEMM."""

import pytest
import torch

from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank

pytestmark = pytest.mark.megatron

E, D = 4, 8
COUNTS = [[5, 0, 1, 4], [0, 0, 0, 7], [3, 0, 0, 0], [0, 0, 0, 0]]


def experts(backend: str, **settings):
    torch.manual_seed(7)
    layer = one_rank.moe_layer(DynMoEConfig(backend=backend), num_experts=E, **settings)
    return layer.experts


def weights_of(local, name: str, gradient: bool = False) -> torch.Tensor:
    """The weights or gradients of upstream's experts, stacked."""
    weights = [getattr(expert, name).weight for expert in local.local_experts]
    if not gradient:
        return torch.stack([weight.detach() for weight in weights])
    zero = torch.zeros_like(weights[0])
    return torch.stack([zero if weight.grad is None else weight.grad for weight in weights])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
# 12: rows of grouped_mm in fp32; 10: not aligned, so one by one.
@pytest.mark.parametrize("ffn", [12, 16, 10])
def test_equal_to_upstreams_experts(counts, dtype, tolerance, ffn):
    settings = {"moe_ffn_hidden_size": ffn, "params_dtype": dtype, "bf16": dtype == torch.bfloat16}
    local, native = experts("local", **settings), experts("torch_native", **settings)
    assert torch.equal(native.weight1, weights_of(local, "linear_fc1"))
    assert torch.equal(native.weight2, weights_of(local, "linear_fc2"))

    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(counts), D, generator=generator).to(dtype)
    probs = torch.rand(sum(counts), generator=generator)
    direction = torch.randn(sum(counts), D, generator=generator).to(dtype)
    results = []
    for module in (local, native):
        inputs = [rows.clone().requires_grad_(), probs.clone().requires_grad_()]
        output, bias = module(inputs[0], torch.tensor(counts), inputs[1])
        assert bias is None
        output.backward(direction)
        results.append([output, *(leaf.grad for leaf in inputs)])
    results[0] += [weights_of(local, name, gradient=True) for name in ("linear_fc1", "linear_fc2")]
    results[1] += [native.weight1.grad, native.weight2.grad]
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_kinds_of_gemm_agree(dtype):
    from megatron_dynmoe.moe.grouped_linear import grouped_linear, uses_grouped_mm

    assert uses_grouped_mm(torch.device("cpu"), dtype, 16, 24)
    assert not uses_grouped_mm(torch.device("cpu"), dtype, 16, 25)
    counts = torch.tensor([3, 0, 5])
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(8, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(3, 24, 16, generator=generator).to(dtype).requires_grad_()
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 1))  # 25 rows, of which one is empty
    grouped = grouped_linear(rows, weight, counts)
    looped = grouped_linear(rows, padded, counts)[:, :24]
    torch.testing.assert_close(grouped, looped)
    # The gradient of a sum is an expanded tensor.
    got = torch.autograd.grad(grouped.sum(), (rows, weight))
    want = torch.autograd.grad(looped.sum(), (rows, weight))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("counts", [[3, 0, 5], [2, 4, 2], [0, 8, 0], [0, 0, 0]], ids=str)
def test_an_expert_without_rows_gets_a_zero_gradient_whatever_grouped_mm_returns(
    monkeypatch, counts
):
    from megatron_dynmoe.moe.grouped_linear import grouped_linear

    grouped_mm, left_unwritten = torch.nn.functional.grouped_mm, []

    def as_on_blackwell(left, right, *, offs):
        result = grouped_mm(left, right, offs=offs)
        if result.dim() == 3:  # a weight's gradient
            for expert in (offs.diff(prepend=offs.new_zeros(1)) == 0).nonzero().flatten():
                left_unwritten.append(int(expert))
                result[expert] = torch.nan if expert == 0 else 1e3
        return result

    rows = torch.randn(sum(counts), 16).requires_grad_()
    weight = torch.randn(3, 24, 16).requires_grad_()
    want = torch.autograd.grad(
        grouped_linear(rows, weight, torch.tensor(counts)).square().sum(), (rows, weight)
    )
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", as_on_blackwell)
    output = grouped_linear(rows, weight, torch.tensor(counts))
    got = torch.autograd.grad(output.square().sum(), (rows, weight))
    if sum(counts):  # without any row the loop has nothing to do
        assert left_unwritten == [expert for expert in range(3) if not counts[expert]]
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("size", [12, 11], ids=["grouped", "looped"])
def test_weight_gradients_add_up_in_megatrons_buffer(counts, size):
    """Of two micro-batches, to what is in the buffer; none is computed elsewhere to be added."""
    from megatron_dynmoe.moe.grouped_linear import grouped_linear

    generator = torch.Generator().manual_seed(5)
    weight = one_rank.in_a_buffer(torch.randn(E, size, D, generator=generator))
    want = weight.main_grad.normal_(generator=generator).double()
    for _ in range(2):
        rows = torch.randn(sum(counts), D, generator=generator).requires_grad_()
        direction = torch.randn(sum(counts), size, generator=generator)
        wide = [rows.detach().double(), weight.detach().double()]
        for operand in wide:
            operand.requires_grad_()
        parts = zip(wide[0].split(counts), wide[1], strict=True)
        oracle = torch.cat([rows_e @ weight_e.t() for rows_e, weight_e in parts])
        oracle.backward(direction.double())
        want = want + wide[1].grad
        grouped_linear(rows, weight, torch.tensor(counts)).backward(direction)
        torch.testing.assert_close(rows.grad.double(), wide[0].grad, rtol=1e-5, atol=1e-5)
        assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad.double(), want, rtol=1e-5, atol=1e-5)


def test_room_without_rows_adds_nothing_to_megatrons_buffer():
    """Rows of a row buffer that no token has taken hold anything."""
    from megatron_dynmoe.moe.grouped_linear import grouped_linear

    buffers = []
    for room in (0, 3):
        generator = torch.Generator().manual_seed(6)
        weight = one_rank.in_a_buffer(torch.randn(E, 12, D, generator=generator))
        rows = torch.randn(10, D, generator=generator)
        rows = torch.cat([rows, torch.full((room, D), torch.nan)]).requires_grad_()
        output = grouped_linear(rows, weight, torch.tensor(COUNTS[0]))
        output.backward(torch.cat([torch.ones(10, 12), torch.full((room, 12), torch.nan)]))
        buffers.append(weight.main_grad)
    assert buffers[0].any() and torch.equal(*buffers)


@pytest.mark.parametrize("size", [12, 11], ids=["grouped", "looped"])
def test_what_is_frozen_adds_nothing_to_its_buffer(size):
    from megatron_dynmoe.moe.grouped_linear import grouped_linear

    weight = one_rank.in_a_buffer(torch.randn(E, size, D)).requires_grad_(False)
    rows = torch.randn(10, D).requires_grad_()
    grouped_linear(rows, weight, torch.tensor(COUNTS[0])).sum().backward()
    assert rows.grad.any() and not weight.main_grad.any() and not weight.grad_added_to_main_grad


@pytest.mark.parametrize("size", [12, 11], ids=["grouped", "looped"])
def test_a_buffer_of_another_type_is_left_to_megatron(size):
    from megatron_dynmoe.moe.grouped_linear import grouped_linear

    weight = one_rank.in_a_buffer(torch.randn(E, size, D).bfloat16())
    rows, counts = torch.randn(10, D).bfloat16(), torch.tensor(COUNTS[0])
    grouped_linear(rows, weight, counts).sum().backward()
    assert not weight.grad_added_to_main_grad and not weight.main_grad.any()
    assert weight.grad[0].any() and not weight.grad[1].any()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ffn", [16, 10], ids=["grouped", "looped"])
def test_every_gradient_is_in_megatrons_own_buffer_once(monkeypatch, ffn, overlap):
    """As if Megatron's hook had added it."""
    from megatron_dynmoe.moe import grouped_linear

    got = one_rank.buffer_after_two_micro_batches(overlap, moe_ffn_hidden_size=ffn)
    monkeypatch.setattr(grouped_linear, "adds_to_buffer", lambda weight: False)
    for name, want in one_rank.buffer_after_two_micro_batches(
        overlap, moe_ffn_hidden_size=ffn
    ).items():
        assert want.any(), name
        torch.testing.assert_close(got[name], want)


@pytest.mark.parametrize(("counts", "passes"), [([1, 2], 0), ([3, 0], 1)], ids=str)
def test_counts_on_the_host_save_the_pass_over_a_devices_gradient(monkeypatch, counts, passes):
    from megatron_dynmoe.moe.grouped_linear import _zero_unused

    gradient, called = torch.empty(2, 4, 4, device="meta"), []
    monkeypatch.setattr(torch.Tensor, "masked_fill_", lambda *_: called.append(1))
    _zero_unused(gradient, torch.tensor(counts) == 0)
    assert len(called) == passes


@pytest.mark.parametrize("counts", [[1, 2, 1], [3, 0, 1], [0, 0, 4]], ids=str)
def test_on_a_cpu_only_the_gradients_of_unused_experts_are_touched(counts):
    from megatron_dynmoe.moe.grouped_linear import _zero_unused

    gradient = torch.randn(3, 4, 5)
    expected = gradient * (torch.tensor(counts) > 0).view(-1, 1, 1)
    assert torch.equal(_zero_unused(gradient, torch.tensor(counts) == 0), expected)


def test_upstreams_fused_activation_agrees():
    native = experts("torch_native", moe_ffn_hidden_size=16)
    rows, probs = torch.randn(6, D), torch.rand(6)
    counts = torch.tensor([1, 2, 3, 0])
    plain, _ = native(rows, counts, probs)
    native.config.bias_activation_fusion = True
    fused, _ = native(rows, counts, probs)
    torch.testing.assert_close(fused, plain)


def test_singleton_shards_are_refused():
    with pytest.raises(ValueError, match="backend local"):
        experts("torch_native").sharded_state_dict(metadata={"singleton_local_shards": True})
