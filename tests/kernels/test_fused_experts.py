"""The fused experts against float64, an expert after another."""

import pytest
import torch

from tests.kernels.device import DEVICE
from tests.kernels.test_grouped_gemm import COUNTS, DTYPES, assert_close, ends_of, normal

pytest.importorskip("triton")
from megatron_dynmoe.kernels import fused_experts
from megatron_dynmoe.kernels.fused_experts import differentiate_activation, multiply_and_activate

pytestmark = [pytest.mark.megatron, pytest.mark.triton]

SIZES = [(40, 24), (1, 130), (33, 1)]  # hidden size and FFN size
UNUSED = 3  # rows for which there is room after the last expert's
either_dtype = pytest.mark.parametrize("dtype", DTYPES)
some_sizes = pytest.mark.parametrize(("hidden", "ffn"), SIZES)
some_counts = pytest.mark.parametrize("counts", COUNTS)
gathered = pytest.mark.parametrize("gathers", [True, False], ids=["gathered", "in place"])


def tokens_of(counts: list[int], gathers: bool) -> tuple[int, torch.Tensor | None]:
    """The number of tokens, and that of each row; the unused rows have a token that is not there.

    Without gathering there are as many tokens as rows.
    """
    num_rows = sum(counts)
    if not gathers:
        return num_rows + UNUSED, None
    num_tokens = num_rows // 2 + 1
    generator = torch.Generator().manual_seed(0)
    token_R = torch.randint(num_tokens, (num_rows,), generator=generator)
    return num_tokens, torch.cat([token_R, torch.full((UNUSED,), 10**9)]).to(DEVICE)


def rows_of(values: torch.Tensor, token_R: torch.Tensor | None, num_rows: int) -> torch.Tensor:
    return values[:num_rows] if token_R is None else values[token_R[:num_rows]]


def products(rows: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[R, O] of [R, I] and [E, O, I], in float64."""
    parts = zip(rows.double().split(counts), weight.double(), strict=True)
    return torch.cat([part @ of_expert.T for part, of_expert in parts])


@either_dtype
@some_sizes
@some_counts
@gathered
def test_rows_are_gathered_multiplied_and_activated(counts, hidden, ffn, dtype, gathers):
    num_rows, (num_tokens, token_R) = sum(counts), tokens_of(counts, gathers)
    tokens, weight = (
        normal(num_tokens, hidden, dtype=dtype),
        normal(len(counts), 2 * ffn, hidden, dtype=dtype),
    )
    probs = torch.rand(num_rows + UNUSED).to(DEVICE)
    gate_up, activated = multiply_and_activate(tokens, token_R, probs, weight, ends_of(counts))
    assert gate_up.dtype == activated.dtype == dtype
    want = products(rows_of(tokens, token_R, num_rows), weight, counts)
    assert_close(gate_up[:num_rows], want)
    gate, up = gate_up[:num_rows].double().chunk(2, dim=-1)  # it is computed from these
    silu = torch.nn.functional.silu(gate)
    assert_close(activated[:num_rows], silu * up * probs[:num_rows, None].double())


@either_dtype
@some_sizes
@some_counts
@gathered
def test_gradients_of_the_activation_are_those_of_float64(counts, hidden, ffn, dtype, gathers):
    num_rows, (num_tokens, token_R) = sum(counts), tokens_of(counts, gathers)
    d_output = normal(num_tokens, hidden, dtype=dtype)
    weight = normal(len(counts), hidden, ffn, dtype=dtype)
    probs = torch.rand(num_rows + UNUSED).to(DEVICE)
    gate_up = normal(num_rows + UNUSED, 2 * ffn, dtype=dtype)
    found = differentiate_activation(d_output, token_R, probs, weight, gate_up, ends_of(counts))
    d_gate_up, d_probs, activated = found
    wide, probs_64 = (x[:num_rows].double().requires_grad_() for x in (gate_up, probs))
    gate, up = wide.chunk(2, dim=-1)
    want = torch.nn.functional.silu(gate) * up * probs_64[:, None]
    d_want = products(rows_of(d_output, token_R, num_rows), weight.transpose(1, 2), counts)
    want.backward(d_want)
    assert_close(activated[:num_rows], want.detach())
    assert_close(d_gate_up[:num_rows], wide.grad)
    assert d_probs.dtype == torch.float32
    # A sum over the FFN size, of which the products are rounded; the dtype is that of the sum.
    assert_close(d_probs[:num_rows].to(dtype), probs_64.grad)
    assert not d_probs[num_rows:].any()


@either_dtype
def test_the_backward_pass_computes_the_same_activation_again(dtype):
    counts, ffn = [3, 0, 128, 20], 70
    probs, ends = torch.rand(sum(counts)).to(DEVICE), ends_of(counts)
    tokens, weight = normal(sum(counts), 40, dtype=dtype), normal(4, 2 * ffn, 40, dtype=dtype)
    gate_up, activated = multiply_and_activate(tokens, None, probs, weight, ends)
    of_second = normal(4, 40, ffn, dtype=dtype)
    *_, again = differentiate_activation(tokens, None, probs, of_second, gate_up, ends)
    assert torch.equal(again, activated)


def test_every_way_to_cut_into_tiles_gives_the_same(monkeypatch):
    """Parts of the weights' gradients are those of wide tiles or of narrow ones."""
    counts, hidden, ffn = [3, 0, 130], 40, 150
    ends, probs = ends_of(counts), torch.rand(sum(counts)).to(DEVICE)
    tokens, of_first, of_second = (
        normal(*shape, dtype=torch.float32)
        for shape in ((sum(counts), hidden), (3, 2 * ffn, hidden), (3, hidden, ffn))
    )
    kernels = fused_experts._gate_and_up, fused_experts._gate_and_up_backward
    found = []
    for way in {*fused_experts.WAYS, *fused_experts.BACKWARD_WAYS}:
        for kernel in kernels:
            monkeypatch.setattr(kernel, "configs", [way.config])
        gate_up, activated = multiply_and_activate(tokens, None, probs, of_first, ends)
        gradients = differentiate_activation(tokens, None, probs, of_second, gate_up, ends)
        found.append((gate_up, activated, *gradients))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert_close(got, want.double())
