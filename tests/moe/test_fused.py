"""Fused experts: against float64, within a layer, into Megatron's buffer, and what they move."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from megatron_dynmoe import kernels
from megatron_dynmoe.moe import experts, fused, permute
from megatron_dynmoe.moe.fused import fused_experts
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.kernels.device import DEVICE
from tests.moe import one_rank

pytestmark = [pytest.mark.megatron, pytest.mark.triton]

T, E, D, F = 11, 5, 24, 20
MAP_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(0)) < 0.4
MAP_TE[3] = False  # a token without an expert
MAP_TE[:, 2] = False  # an expert without a token


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch):
    """Triton's, whatever the device, and no grouped GEMM of PyTorch's."""
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(permute, "scatters_in_order", lambda device: False)
    monkeypatch.setattr(fused, "uses_grouped_mm", lambda *_: False)


def order_of(unused: int = 0) -> permute.RowOrder:
    map_TE = MAP_TE.to(DEVICE)
    return permute.order_rows(map_TE, int(MAP_TE.sum()) + unused, all_used=not unused)


def operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Tokens, weights of all tokens and experts, and both weights of the experts."""
    generator = torch.Generator().manual_seed(1)
    shapes = (T, D), (T, E), (E, 2 * F, D), (E, D, F)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    values[1] = values[1].abs()
    kinds = dtype, torch.float32, dtype, dtype
    return [
        value.to(DEVICE, kind).requires_grad_() for value, kind in zip(values, kinds, strict=True)
    ]


def run(values: list[torch.Tensor], order: permute.RowOrder) -> torch.Tensor:
    tokens, weights_TE, first, second = values
    probs = permute.weights_of(weights_TE, order)
    return fused_experts(tokens, probs, first, second, MAP_TE.sum(dim=0), order)


def token_by_token(values: list[torch.Tensor]) -> torch.Tensor:
    """The sum of each token's experts, in float64."""
    tokens, weights_TE, first, second = (value.double() for value in values)
    rows = []
    for token, chosen in enumerate(MAP_TE):
        total = torch.zeros(D, dtype=torch.float64, device=DEVICE)
        for expert in chosen.nonzero().flatten().tolist():
            gate, up = (first[expert] @ tokens[token]).chunk(2)
            activated = torch.nn.functional.silu(gate) * up * weights_TE[token, expert]
            total = total + second[expert] @ activated
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("unused", [0, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_those_of_a_loop_over_tokens(dtype, tolerance, unused):
    values = operands(dtype)
    direction = torch.randn(T, D, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    want = token_by_token(values)
    expected = [want, *torch.autograd.grad(want, values, direction.double())]
    got = run(values, order_of(unused))
    results = [got, *torch.autograd.grad(got, values, direction)]
    assert got.dtype == dtype
    for result, wanted in zip(results, expected, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(result.double(), wanted.double(), rtol=0, atol=tolerance * scale)
    assert not results[0][3].any() and not results[3][2].any() and not results[4][2].any()


@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient_and_the_others_the_same(frozen):
    values = operands()
    run(values, order_of()).square().sum().backward()
    want = [value.grad for value in values]
    values = operands()
    values[frozen].requires_grad_(False)
    run(values, order_of()).square().sum().backward()
    for place, value in enumerate(values):
        assert value.grad is None if place == frozen else torch.equal(value.grad, want[place])


def test_float64_is_not_for_kernels_whose_sums_are_float32():
    device = torch.device(DEVICE)
    assert fused.is_fused(device, torch.float32, D, F)
    assert not fused.is_fused(device, torch.float64, D, F)


def test_no_rows_leave_gradients_of_zero():
    tokens, weights_TE, *weights = operands()
    nobody = permute.order_rows(torch.zeros_like(MAP_TE).to(DEVICE), 0)
    probs = permute.weights_of(weights_TE, nobody)
    output = fused_experts(tokens, probs, *weights, torch.zeros(E, dtype=torch.int64), nobody)
    assert output.shape == (T, D) and not output.any()
    for gradient in torch.autograd.grad(output.sum(), [tokens, weights_TE, *weights]):
        assert not gradient.any()
    buffered = [one_rank.in_a_buffer(weight) for weight in weights]
    for weight in buffered:
        weight.main_grad.fill_(3.0)
    counts = torch.zeros(E, dtype=torch.int64)
    fused_experts(tokens, probs.detach(), *buffered, counts, nobody).sum().backward()
    assert all((weight.main_grad == 3).all() for weight in buffered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_of_micro_batches_add_up_in_megatrons_buffer(dtype):
    values = operands(dtype)
    want = [torch.zeros_like(value, dtype=torch.float64) for value in values[2:]]
    weights = [one_rank.in_a_buffer(value) for value in values[2:]]
    for micro_batch in (1, 2):
        tokens = values[0].detach() * micro_batch
        wide = [tokens.double(), values[1], *values[2:]]
        total = token_by_token(wide).sum()
        for sum_so_far, gradient in zip(want, torch.autograd.grad(total, values[2:]), strict=True):
            sum_so_far.add_(gradient)
        run([tokens, values[1], *weights], order_of()).sum().backward()
    for weight, wanted in zip(weights, want, strict=True):
        assert weight.grad_added_to_main_grad
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * wanted.abs().max().item()
        torch.testing.assert_close(weight.main_grad.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("overlap", [False, True])
def test_megatrons_own_buffer_gets_every_gradient_once(overlap):
    """As without fusion, for which Megatron's hook adds the gradient."""
    buffers = []
    for setting in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experts, "is_fused", lambda *_, setting=setting: setting)
            buffers.append(one_rank.buffer_after_two_micro_batches(overlap, DEVICE))
    for name, want in buffers[0].items():
        scale = want.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(buffers[1][name], want, rtol=0, atol=1e-5 * scale)


def test_rows_that_came_from_other_ranks_are_not_gathered(monkeypatch):
    """Experts of several ranks get rows, in order."""
    one_rank.world_of_one()
    results = []
    for setting in (False, True):
        monkeypatch.setattr(experts, "is_fused", lambda *_, setting=setting: setting)
        torch.manual_seed(1)
        dynmoe = DynMoEConfig(routing="top_p", threshold=0.4, backend="torch_native")
        layer = one_rank.moe_layer(dynmoe, num_experts=4, moe_token_dispatcher_type="allgather")
        hidden = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        output, _ = layer.to(DEVICE)(hidden.requires_grad_())
        output.square().sum().backward()
        results.append([output, hidden.grad, *(p.grad for p in layer.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Moved(TorchDispatchMode):
    """Counts the bytes that operators read and write, and how many there are; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        outputs = result if isinstance(result, tuple | list) else [result]
        outputs = [value for value in outputs if isinstance(value, torch.Tensor)]
        if function.namespace != "prim" and not function.is_view and "empty" not in function.name():
            self.calls += 1
            self.bytes += sum(value.numel() * value.itemsize for value in [*tensors, *outputs])
        return result


def test_a_layer_moves_and_keeps_little_more_than_it_must():
    """At the size of a layer of Dynamic MoE's 3.5 B model, on tensors without values."""
    tokens, experts_, hidden, ffn, rows, half = 8 * 2048, 16, 1024, 2816, 2 * 8 * 2048, 2
    with FakeTensorMode():
        values = torch.empty(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
        first = torch.empty(experts_, 2 * ffn, hidden, dtype=torch.bfloat16, requires_grad=True)
        second = torch.empty(experts_, hidden, ffn, dtype=torch.bfloat16, requires_grad=True)
        probs = torch.empty(rows, requires_grad=True)
        places = torch.empty(rows, dtype=torch.int64)
        ends_T = torch.empty(tokens, dtype=torch.int64)
        order = permute.RowOrder(places, places, tokens, True, places, ends_T)
        counts = torch.empty(experts_, dtype=torch.int64)
        kept: list[torch.Tensor] = []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        )
        with Moved() as moved, keep:
            output = fused_experts(values, probs, first, second, counts, order)
        assert output.shape == (tokens, hidden)
    weights = first.numel() + second.numel()
    # Input and output, weights, gate and up, the activation and the rows, both twice.
    least = half * (2 * tokens * hidden + weights + rows * (2 * ffn + 2 * ffn + 2 * hidden))
    assert least == pytest.approx(1.22e9, rel=0.02)
    assert least <= moved.bytes <= 1.03 * least
    assert moved.calls <= 4
    # Of the rows only gate and up are kept, and the weights.
    of_rows = [tensor for tensor in kept if len(tensor) == rows]
    assert sorted(list(tensor.shape) for tensor in of_rows) == [[rows], [rows, 2 * ffn]]
    assert sum(tensor.numel() * tensor.itemsize for tensor in of_rows) < 400e6
