"""The CPU's blocks against the readable route: selections and counts to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dynmoe import kernels
from megatron_dynmoe.kernels import routing_cpu
from megatron_dynmoe.kernels.routing_cpu import route_in_blocks
from megatron_dynmoe.routing.route import route
from megatron_dynmoe.routing.select import select

EXACT = ("map_TE", "experts_T", "assignments_BE", "not_finite")
CLOSE = ("weights_TE", "prob_sums_BE", "entropy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cap", [None, 1, 3])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("num_experts", [1, 2, 5, 64])
def test_outputs_and_gradients_are_those_of_the_readable_route(
    num_experts, normalized, renormalize, cap, padded, dtype
):
    num_sequences, num_tokens = 2, 14
    generator = torch.Generator().manual_seed(num_experts)
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator)
    logits[3] = logits[3, 0]  # all experts tie
    logits[4, : num_experts // 2] = logits[4].max()
    logits = logits.to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    theta = torch.tensor([1.3], dtype=wide, requires_grad=True) if normalized else None
    valid = torch.arange(num_tokens) % 5 != 3 if padded else None
    seeds = [torch.randn(n, num_experts, generator=generator) for n in (num_tokens, num_sequences)]
    seeds = [seed.to(wide) for seed in (*seeds, torch.tensor(0.7))]
    results = []
    for function in (route_in_blocks, route):
        result = function(
            logits, 0.6, theta=theta, max_experts=cap, renormalize=renormalize,
            num_sequences=num_sequences, valid_T=valid,
        )  # fmt: skip
        inputs = (logits,) if theta is None else (logits, theta)
        outputs = [getattr(result, name) for name in CLOSE]
        results.append((result, torch.autograd.grad(outputs, inputs, seeds)))
    (got, got_gradients), (want, want_gradients) = results
    for name in EXACT:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert getattr(got, name).dtype == getattr(want, name).dtype, name
    for name in CLOSE:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), msg=name)
    for one, other in zip(got_gradients, want_gradients, strict=True):
        # Of two normalized experts the gradient is a difference of all but equal numbers, so that
        # float32 has few digits of it; in float64 the formula has to show.
        largest = max(other.abs().max().item(), 1e-2)
        rtol = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * largest)


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(any),
    st.one_of(st.floats(-0.25, 1.25, width=32), st.integers(0, 40)),
    st.one_of(st.none(), st.integers(1, 30)),
)
def test_the_selection_is_exact_with_ties_and_boundaries(masses, threshold, cap):
    probs = torch.tensor([masses], dtype=torch.float32) / sum(masses)
    if isinstance(threshold, int):  # exactly one of the cumulative sums
        sums = probs.sort(descending=True).values.cumsum(-1)[0]
        threshold = sums[threshold % len(masses)].item()
    got, experts = routing_cpu._select_and_count(probs, threshold, cap)
    want = select(probs, threshold, cap)
    assert torch.equal(got.bool(), want)
    assert torch.equal(experts, want.sum(dim=-1))


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("num_experts", [1, 2, 5, 64])
def test_extreme_thresholds_and_probabilities(num_experts, threshold):
    one_hot = torch.zeros(1, num_experts)
    one_hot[0, -1] = 1
    tiny = torch.full((1, num_experts), 2.0**-62)
    tiny[0, 0] = 1
    uniform = torch.full((1, num_experts), 1 / num_experts)
    nan = torch.full((1, num_experts), float("nan"))
    probs = torch.cat([one_hot, tiny, uniform, nan])
    got, experts = routing_cpu._select_and_count(probs, threshold, None)
    want = select(probs, threshold)
    assert torch.equal(got.bool(), want)
    assert torch.equal(experts, want.sum(dim=-1))


def test_bad_input_is_refused_as_by_the_readable_route():
    for function in (route, route_in_blocks):
        with pytest.raises(ValueError, match="max_experts is 0"):
            function(torch.zeros(2, 4), 0.5, max_experts=0)
        with pytest.raises(ValueError, match=r"3 tokens.*num_sequences 2"):
            function(torch.zeros(3, 4), 0.5, num_sequences=2)


@pytest.mark.parametrize(
    ("setting", "chosen"), [(None, route_in_blocks), ("1", route_in_blocks), ("0", route)]
)
def test_the_environment_chooses(monkeypatch, setting, chosen):
    monkeypatch.delenv("DYNMOE_KERNELS", raising=False)
    if setting is not None:
        monkeypatch.setenv("DYNMOE_KERNELS", setting)
    assert kernels.choose_route(torch.zeros(2, 4)) is chosen


def test_a_tensor_that_numpy_cannot_read_takes_the_readable_route(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.delenv("DYNMOE_KERNELS", raising=False)
    with FakeTensorMode():
        logits = torch.zeros(2, 4)
        assert kernels.choose_route(logits) is route
        assert route(logits, 0.5).map_TE.shape == (2, 4)


def test_another_word_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("DYNMOE_KERNELS", "yes")
    with pytest.raises(ValueError, match="DYNMOE_KERNELS is 'yes': set 0"):
        kernels.choose_route(torch.zeros(2, 4))
