"""permute and unpermute against upstream's definition, and the kernel against plain PyTorch."""

import pytest
import torch

from megatron_dynmoe.moe import permute as plain
from tests.kernels.device import DEVICE

pytest.importorskip("triton")
from megatron_dynmoe.kernels.permute import order_by_expert, sum_rows

T, E = 9, 5


def maps() -> dict[str, torch.Tensor]:
    random = torch.rand(T, E, generator=torch.Generator().manual_seed(0)) < 0.4
    random[4] = False  # a token without an expert
    random[:, 2] = False  # an expert without a token
    one = torch.zeros(T, E, dtype=torch.bool)
    one[:, 3] = True
    return {"random": random, "one": one, "all": ~(one & False), "none": one & False}


@pytest.fixture(params=maps())
def routing_map(request) -> torch.Tensor:
    return maps()[request.param].to(DEVICE)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def test_rows_are_ordered_by_expert_and_then_by_token(routing_map):
    order = plain.order_rows(routing_map, int(routing_map.sum()))
    want = [(e, t) for e in range(E) for t in range(T) if routing_map[t, e]]
    assert order.token_R.tolist() == [token for _, token in want]
    assert order.weight_R.tolist() == [token * E + expert for expert, token in want]


def test_there_and_back_with_weights_is_the_weighted_sum_and_so_are_its_gradients(routing_map):
    results = []
    for dense in (False, True):
        tokens, weights = values(T, 4), values(T, E)
        scale = torch.arange(1, E + 1, device=DEVICE)
        if dense:
            output = tokens * (weights * scale * routing_map).sum(-1, keepdim=True)
        else:
            order = plain.order_rows(routing_map, int(routing_map.sum()))
            rows, row_weights = plain.permute(tokens, weights, order)
            rows = rows * (row_weights * scale[order.weight_R % E]).unsqueeze(-1)
            output = plain.unpermute(rows, order)
        output.square().sum().backward()
        results.append((output, tokens.grad, weights.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unused", [0, 3])
@pytest.mark.parametrize(
    ("tokens", "experts"), [(T, E), (1, 1), (300, 16), (9, 512), (2049, 1), (0, 4)]
)
@pytest.mark.triton
def test_the_kernels_order_rows_as_nonzero_does(tokens: int, experts: int, unused: int) -> None:
    for share in (0.0, 0.2, 1.0):
        drawn = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1))
        routing_map = (drawn < share).to(DEVICE)
        num_rows = int(routing_map.sum())
        got = order_by_expert(routing_map, num_rows + unused, all_used=not unused)
        token_R, weight_R, row_of_slot, end_T = got
        chosen = routing_map.t().nonzero()  # in the order of experts, and of tokens within
        filler = torch.tensor([tokens, tokens * experts], device=DEVICE).expand(unused, 2)
        want = torch.stack([chosen[:, 1], chosen[:, 1] * experts + chosen[:, 0]], dim=1)
        assert torch.equal(torch.stack([token_R, weight_R], dim=1), torch.cat([want, filler]))
        slots, ends = plain._by_token(routing_map, want[:, 0])
        assert torch.equal(row_of_slot[:num_rows], slots)
        assert torch.equal(end_T, ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 1100])  # 1100: more than one block
@pytest.mark.triton
def test_the_kernel_adds_up_every_tokens_rows(routing_map, width, dtype):
    order = plain.order_rows(routing_map, int(routing_map.sum()))
    rows = values(len(order.token_R), width, dtype=dtype).detach()
    got = sum_rows(rows, *plain._by_token(routing_map, order.token_R))
    want = torch.zeros(T, width, dtype=torch.float64, device=DEVICE)
    want.index_add_(0, order.token_R, rows.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype))
    assert torch.equal(got, sum_rows(rows, *plain._by_token(routing_map, order.token_R)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("unused", [0, 3])
def test_a_device_without_kernels_sums_by_segments(routing_map, dtype, unused):
    num_rows = int(routing_map.sum())
    order = plain.order_rows(routing_map, num_rows + unused, all_used=not unused)
    slots = plain._by_token(routing_map, order.token_R)
    order = order._replace(row_of_slot=slots[0], end_T=slots[1])
    rows = values(num_rows + unused, 7, dtype=dtype).detach()
    rows[num_rows:] = torch.nan
    want = torch.zeros(T, 7, dtype=torch.float64, device=DEVICE)
    want.index_add_(0, order.token_R[:num_rows], rows[:num_rows].double())
    got = plain.unpermute(rows, order)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype))
