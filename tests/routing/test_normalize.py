"""normalize, against the mean and standard deviation written out."""

import pytest
import torch

from megatron_dynmoe.routing.normalize import normalize
from tests.oracles import routing as oracle


def random_logits(num_experts: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return scale * torch.randn(20, num_experts, generator=generator, dtype=torch.float64) + 3


@pytest.mark.parametrize("theta", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("num_experts", [1, 2, 8, 128])
def test_follows_the_loops(num_experts, scale, theta):
    logits = random_logits(num_experts, scale)
    want = torch.tensor([oracle.normalize(row, theta) for row in logits.tolist()]).double()
    torch.testing.assert_close(normalize(logits, theta), want, rtol=1e-6, atol=1e-6)


def test_mean_zero_and_standard_deviation_theta():
    normalized = normalize(random_logits(64), torch.tensor([2.5], dtype=torch.float64))
    zeros, stds = torch.zeros(20).double(), torch.full((20,), 2.5).double()
    torch.testing.assert_close(normalized.mean(-1), zeros)
    torch.testing.assert_close(normalized.std(-1, correction=0), stds, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e4])
@pytest.mark.parametrize("num_experts", [1, 2, 16])
def test_constant_logits_give_uniform_probabilities(num_experts, value):
    logits = torch.full((3, num_experts), value, requires_grad=True)
    probs = normalize(logits, 4.0).softmax(-1)
    torch.testing.assert_close(probs, torch.full_like(probs, 1 / num_experts))
    probs.square().sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e18, 1e30])
def test_huge_and_tiny_logits_give_finite_probabilities_and_gradients(scale):
    logits = (random_logits(8).float() * scale).requires_grad_()
    probs = normalize(logits, 1.0).softmax(-1)
    probs[:, 0].sum().backward()
    assert probs.isfinite().all()
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(20))


def test_scale_and_offset_of_the_logits_do_not_matter():
    logits = random_logits(16)
    torch.testing.assert_close(
        normalize(5 * logits - 2, 1.0), normalize(logits, 1.0), rtol=1e-5, atol=1e-5
    )


def test_a_token_does_not_see_the_others():
    logits = random_logits(16)
    assert torch.equal(normalize(logits, 1.5)[4:5], normalize(logits[4:5], 1.5))


def test_a_larger_theta_is_sharper():
    logits = random_logits(16)
    soft, sharp = (normalize(logits, theta).softmax(-1).amax(-1) for theta in (1.0, 3.0))
    assert (sharp > soft).all()


def test_float32_is_near_float64_and_stays_float32():
    logits = random_logits(64)
    got = normalize(logits.float(), torch.tensor([1.5]))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), normalize(logits, 1.5), rtol=1e-5, atol=1e-5)
