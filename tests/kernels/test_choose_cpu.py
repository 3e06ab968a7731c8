"""What a CPU chooses in inference is what the rule chooses."""

import pytest
import torch

from megatron_dynmoe.kernels.choose_cpu import choose, choose_top_k
from megatron_dynmoe.routing import select

RANDOM = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).softmax(-1)
TIED = torch.randint(1, 4, (40, 8), generator=torch.Generator().manual_seed(1)) / 8.0
THRESHOLDS = [0.0, 0.25, 0.5, 0.7, 0.99999999, 1.0, -1.0, float("nan")]


def probabilities():
    """Tokens with boundaries, ties and NaN."""
    probs_TE = torch.cat((RANDOM, TIED, torch.eye(8)))
    probs_TE[3, 2] = probs_TE[50] = torch.nan
    return probs_TE


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cap", [None, 1, 3])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("probs_TE", [RANDOM, TIED, probabilities()], ids=["random", "tied", "nan"])
def test_of_many_tokens(probs_TE, threshold, cap, dtype):
    probs_TE = probs_TE.to(dtype)
    assert_same(choose(probs_TE, threshold, cap), select.choose(probs_TE, threshold, cap))
    each_T1 = torch.full((len(probs_TE), 1), threshold).roll(1).clamp(max=0.6)
    assert_same(choose(probs_TE, each_T1, cap), select.choose(probs_TE, each_T1, cap))


@pytest.mark.parametrize("cap", [None, 1, 3])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_of_one_token_alone_in_plain_numbers(threshold, cap):
    for probs_1E in probabilities().split(1):
        assert_same(choose(probs_1E, threshold, cap), select.choose(probs_1E, threshold, cap))


@pytest.mark.parametrize("probs_TE", [RANDOM, TIED, probabilities()], ids=["random", "tied", "nan"])
def test_of_top_k(probs_TE):
    assert_same(choose_top_k(probs_TE, 3), select.choose_top_k(probs_TE, 3))


def test_where_values_may_not_decide_the_rule_does(monkeypatch):
    """In training, which stands in for that on a GPU, and if plain PyTorch is asked for."""
    monkeypatch.delenv("DYNMOE_KERNELS", raising=False)
    monkeypatch.setattr("megatron_dynmoe.kernels.choose_cpu._sort_quickly", lambda _: 1 / 0)
    probs_TE = RANDOM.clone().requires_grad_()
    assert_same(choose(probs_TE, 0.5), select.choose(probs_TE, 0.5))
    with pytest.raises(ZeroDivisionError):
        choose(RANDOM, 0.5)
    monkeypatch.setenv("DYNMOE_KERNELS", "0")
    assert_same(choose(RANDOM, 0.5), select.choose(RANDOM, 0.5))
    assert_same(choose_top_k(RANDOM, 3), select.choose_top_k(RANDOM, 3))
    assert_same(choose(RANDOM[:1], 0.5), select.choose(RANDOM[:1], 0.5))
