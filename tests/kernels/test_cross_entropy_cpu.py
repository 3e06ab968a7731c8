"""The loss of whole vocabularies on a CPU is Megatron's, to float32's rounding."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dynmoe.kernels.cross_entropy_cpu import cross_entropy

ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def with_gradient(loss, logits, targets, weights):
    """The losses, and the gradient of their weighted sum."""
    given_logits = logits.clone().requires_grad_()
    losses = loss(given_logits * 1, targets)
    losses.backward(weights)
    return losses.detach(), given_logits.grad


def megatrons(logits, targets):
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    with mock.patch.object(torch.distributed, "all_reduce"):
        return vocab_parallel_cross_entropy(logits, targets, tp_group=ONE_RANK)


def exact(logits, targets):
    return torch.nn.functional.cross_entropy(
        logits.double().flatten(0, -2), targets.flatten(), reduction="none"
    ).view_as(targets)


@pytest.mark.hypothesis
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 70)),
    scale=st.sampled_from([0.0, 1.0, 20.0, 300.0]),  # from 100 on probabilities underflow
    shift=st.sampled_from([0.0, -500.0, 3e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_losses_and_gradients_against_float64(shape, scale, shift, seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=draw) * scale + shift
    targets = torch.randint(shape[-1], shape[:-1], generator=draw)
    weights = torch.randn(shape[:-1], generator=draw)
    losses, gradient = with_gradient(cross_entropy, logits, targets, weights)
    expected, its_gradient = with_gradient(exact, logits, targets, weights)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, its_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.megatron
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_agrees_with_megatron(dtype: torch.dtype) -> None:
    """Also for targets outside of the vocabulary, certain ones, infinite logits and NaN."""
    logits = torch.randn(4, 3, 37, dtype=dtype)
    targets = torch.randint(37, (4, 3))
    targets[0] = torch.tensor([-100, 37, -1])
    logits[1, 0, targets[1, 0]] = 50  # all but certain
    logits[1, 1, targets[1, 1]] = -200  # all but impossible
    logits[1, 2, targets[1, 2]] = -torch.inf
    logits[2, 0, targets[2, 0] - 1] = torch.nan
    logits[2, 1, targets[2, 1] - 1] = torch.inf
    logits[2, 2] = -torch.inf
    weights = torch.randn(4, 3)
    for found, expected in zip(
        with_gradient(cross_entropy, logits, targets, weights),
        with_gradient(megatrons, logits, targets, weights),
        strict=True,
    ):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6, equal_nan=True)


def test_no_memory_but_that_of_the_logits_is_written() -> None:
    """Fresh memory for as large a tensor costs more time than the passes that are saved."""
    logits = torch.randn(6, 4, 50)
    expected = logits.softmax(-1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cross_entropy(hidden := logits.clone().requires_grad_() * 1, torch.ones(6, 4).long())
    assert torch.equal(hidden, expected)
    assert hidden.data_ptr() in {tensor.data_ptr() for tensor in kept}
    as_bf16 = logits.bfloat16()
    cross_entropy(as_bf16, torch.ones(6, 4).long())
    assert torch.equal(as_bf16, logits.bfloat16())


def test_where_it_is_used(monkeypatch) -> None:
    from megatron_dynmoe.upstream.shortcuts import with_whole_vocabularies

    logits, targets = torch.randn(2, 3, 9), torch.ones(2, 3, dtype=torch.int64)
    loss = with_whole_vocabularies(lambda *given: given)
    two_ranks = SimpleNamespace(size=lambda: 2)
    assert isinstance(loss(logits.clone(), targets, tp_group=ONE_RANK), torch.Tensor)
    assert loss(logits, targets, 0.1, ONE_RANK) == (logits, targets, 0.1, ONE_RANK)
    assert loss(logits, targets, 0.0, two_ranks) == (logits, targets, 0.0, two_ranks)
    monkeypatch.setenv("DYNMOE_KERNELS", "0")
    assert loss(logits, targets, tp_group=ONE_RANK) == (logits, targets, 0.0, ONE_RANK)
