"""The Triton kernel against the readable route, on CUDA or in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dynmoe.routing.route import route
from megatron_dynmoe.routing.select import select
from tests.kernels.device import DEVICE
from tests.oracles import routing as oracle

triton = pytest.importorskip("triton")
tl = triton.language
from megatron_dynmoe.kernels import routing_triton  # noqa: E402
from megatron_dynmoe.kernels.routing_triton import route_fused  # noqa: E402

pytestmark = pytest.mark.triton

CASES = [
    (num_experts, 5, normalized, renormalize, cap)
    for num_experts in (1, 2, 5, 16)  # 1 and 5 are padded to the next power of two
    for normalized in (False, True)
    for renormalize in (False, True)
    for cap in (None, 3)
] + [
    # the interpreter takes long to sort wide rows
    (64, 2, True, True, None),
    (100, 1, True, True, None),
    (512, 1, True, True, None),
    (512, 1, False, False, 7),  # a partial sort
]


def random_logits(num_tokens: int, num_experts: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_experts)
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator)
    return logits.to(DEVICE, dtype).requires_grad_()


def away_from_the_threshold(probs, threshold) -> torch.Tensor:
    sums = probs.double().sort(descending=True).values.cumsum(-1)
    return ((sums - threshold).abs() > 1e-6).all(-1)


@pytest.mark.parametrize(
    ("num_experts", "num_positions", "normalized", "renormalize", "cap"), CASES
)
def test_outputs_and_gradients_are_those_of_the_readable_route(
    num_experts, num_positions, normalized, renormalize, cap
):
    num_sequences = 2
    num_tokens = num_positions * num_sequences
    logits = random_logits(num_tokens, num_experts)
    theta = torch.tensor([1.3], device=DEVICE, requires_grad=True) if normalized else None
    valid = torch.arange(num_tokens, device=DEVICE) % 5 != 3
    seeds = [torch.randn(s, device=DEVICE) for s in ((num_tokens, num_experts), (2, num_experts))]
    results = []
    for function in (route_fused, route):
        result = function(
            logits, 0.6, theta=theta, max_experts=cap, renormalize=renormalize,
            num_sequences=num_sequences, valid_T=valid,
        )  # fmt: skip
        inputs = (logits,) if theta is None else (logits, theta)
        outputs = (result.weights_TE, result.prob_sums_BE, result.entropy)
        gradients = torch.autograd.grad(outputs, inputs, (*seeds, torch.tensor(0.7, device=DEVICE)))
        results.append((result, gradients))
    (got, got_gradients), (want, want_gradients) = results
    for name in ("map_TE", "experts_T", "assignments_BE", "not_finite"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert getattr(got, name).dtype == getattr(want, name).dtype, name
    for name in ("weights_TE", "prob_sums_BE", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), msg=name)
    for one, other in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_dtype_in_and_float32_inside(dtype):
    logits = random_logits(20, 16, dtype)
    got, want = route_fused(logits, 0.6, renormalize=True), route(logits, 0.6, renormalize=True)
    assert got.weights_TE.dtype == torch.float32
    clear = away_from_the_threshold(logits.float().softmax(-1), 0.6)
    assert torch.equal(got.map_TE[clear], want.map_TE[clear])
    torch.testing.assert_close(got.weights_TE[clear], want.weights_TE[clear])
    got.weights_TE.square().sum().backward()
    assert logits.grad.dtype == dtype


def exact_map(probs: torch.Tensor, threshold: float, cap: int | None) -> torch.Tensor:
    """The kernel's selection of given float32 probabilities."""
    chosen = torch.zeros_like(probs, dtype=torch.bool)
    width = max(2, triton.next_power_of_2(probs.shape[1]))
    most = min(cap or probs.shape[1], probs.shape[1])
    _select_alone[(len(probs),)](
        probs, chosen, torch.tensor([threshold], device=DEVICE), most, probs.shape[1],
        WIDTH=width, TOP=max(2, triton.next_power_of_2(most)),
    )  # fmt: skip
    return chosen


@triton.jit
def _select_alone(
    probs_ptr, map_ptr, threshold_ptr, cap, num_experts,
    WIDTH: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, WIDTH)[None, :]
    at = tl.program_id(0) * num_experts + columns
    probs = tl.load(probs_ptr + at, mask=columns < num_experts, other=0.0)
    chosen, _ = routing_triton._select(
        probs, columns, num_experts, tl.load(threshold_ptr), cap, WIDTH, TOP
    )
    tl.store(map_ptr + at, chosen, mask=columns < num_experts)


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(any),
    st.one_of(st.floats(-0.25, 1.25, width=32), st.integers(0, 40)),
    st.one_of(st.none(), st.integers(1, 30)),
)
@settings(max_examples=50)
def test_the_mask_is_the_references_exactly_with_ties_and_boundaries(masses, threshold, cap):
    probs = torch.tensor([masses], dtype=torch.float32) / sum(masses)
    if isinstance(threshold, int):  # exactly one of the cumulative sums
        sums = probs.sort(descending=True).values.cumsum(-1)[0]
        threshold = sums[threshold % len(masses)].item()
    want = oracle.select_by_sort(probs, threshold, cap)
    assert torch.equal(exact_map(probs.to(DEVICE), threshold, cap).cpu(), want)
    assert torch.equal(select(probs.to(DEVICE), threshold, cap).cpu(), want)


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("num_experts", [2, 5, 64])
def test_extreme_thresholds_and_probabilities(num_experts, threshold):
    one_hot = torch.zeros(1, num_experts)
    one_hot[0, -1] = 1
    tiny = torch.full((1, num_experts), 2.0**-62)
    tiny[0, 0] = 1
    uniform = torch.full((1, num_experts), 1 / num_experts)
    nan = torch.full((1, num_experts), float("nan"))
    probs = torch.cat([one_hot, tiny, uniform, nan])
    want = oracle.select_by_sort(probs, threshold)
    assert torch.equal(exact_map(probs.to(DEVICE), threshold, None).cpu(), want)


def test_rows_of_nan_get_the_first_expert():
    logits = random_logits(5, 16).detach()
    logits[2, 7] = float("nan")
    result = route_fused(logits, 0.9, renormalize=True)
    assert oracle.choices_of(result.map_TE[2:3]) == [{0}]
    assert result.experts_T[2] == 1


@pytest.mark.parametrize("theta", [None, torch.ones(1, device=DEVICE)], ids=["raw", "drn"])
def test_tokens_that_are_not_finite_are_counted(theta, monkeypatch):
    monkeypatch.setattr(routing_triton, "ELEMENTS_PER_PROGRAM", 64)  # two programs a sequence
    logits = random_logits(40, 4).detach()
    logits[[1, 18, 39], 3] = torch.tensor([float(v) for v in ("nan", "inf", "-inf")]).to(DEVICE)
    assert route_fused(logits, 0.6, theta=theta, num_sequences=2).not_finite == 3
    assert route_fused(logits.nan_to_num(), 0.6, theta=theta, num_sequences=2).not_finite == 0


def test_results_repeat_bitwise():
    logits, theta = random_logits(40, 8), torch.ones(1, device=DEVICE, requires_grad=True)

    def once():
        result = route_fused(logits, 0.5, theta=theta, renormalize=True)
        loss = result.weights_TE.square().sum() + result.entropy
        return (result.prob_sums_BE, result.entropy, *torch.autograd.grad(loss, (logits, theta)))

    for one, other in zip(once(), once(), strict=True):
        assert torch.equal(one, other)
