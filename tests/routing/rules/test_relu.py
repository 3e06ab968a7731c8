"""ReLU routing and its L1 loss, against the paper's equations as loops."""

import pytest
import torch

from megatron_dynmoe.moe.rules.relu import route
from megatron_dynmoe.routing.losses import count_tokens, fractions, load_balance_loss
from tests.oracles import relu as oracle
from tests.oracles import routing

S, B, E, K = 12, 3, 6, 2.0  # positions, sequences, experts, target


def random_logits(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[S * B, E]; the first two tokens have no positive gate, the third has all, with a tie."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(S * B, E, generator=generator, dtype=torch.float64)
    logits_TE[0], logits_TE[1], logits_TE[2] = -1, 0, 0.5
    return logits_TE.to(dtype)


def l1_loss(routed, tokens, target):
    """As the router computes it: the balance loss of the gates over the target."""
    loads_BE = fractions(routed.assignments_BE, tokens, routed.prob_sums_BE.dtype)
    return load_balance_loss(routed.prob_sums_BE, loads_BE, tokens) / target


@pytest.mark.parametrize("max_experts", [None, 1, 3, E])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gates_are_the_weights_and_the_positive_ones_the_experts(dtype, max_experts):
    logits_TE = random_logits(dtype=dtype)
    routed = route(logits_TE, max_experts=max_experts)
    choices = [oracle.choice(row, max_experts) for row in logits_TE.tolist()]
    assert routing.choices_of(routed.map_TE) == choices
    assert routed.experts_T.tolist() == [len(chosen) for chosen in choices]
    assert {0, min(E, max_experts or E)} <= set(routed.experts_T.tolist())
    want = [
        [gate if expert in chosen else 0.0 for expert, gate in enumerate(oracle.gates(row))]
        for row, chosen in zip(logits_TE.tolist(), choices, strict=True)
    ]
    assert routed.weights_TE.tolist() == want
    assert routed.weights_TE.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("num_sequences", [1, B])
@pytest.mark.parametrize("padded", [False, True])
def test_the_balanced_l1_loss_and_its_gradient_follow_the_loops(num_sequences, padded):
    logits_TE = random_logits(1).requires_grad_()
    valid_T = torch.arange(S * B) % 5 != 0 if padded else None
    routed = route(logits_TE, num_sequences=num_sequences, valid_T=valid_T)
    tokens, _ = count_tokens(routed.map_TE, num_sequences, valid_T)
    loss = l1_loss(routed, tokens, K)
    (gradient,) = torch.autograd.grad(loss, logits_TE)

    keep_T = torch.ones(S * B, dtype=torch.bool) if valid_T is None else valid_T
    losses = []
    for first in range(num_sequences):
        tokens_of = [t for t in range(first, S * B, num_sequences) if keep_T[t]]
        rows = [list(logits_TE[t].unbind()) for t in tokens_of]
        choices = [oracle.choice(logits_TE[t].tolist()) for t in tokens_of]
        losses.append(oracle.balanced_l1_loss(rows, choices, K))
    want = sum(losses) / num_sequences
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(want, logits_TE)[0], rtol=1e-12, atol=1e-15
    )


def test_a_fair_load_makes_the_balanced_loss_the_plain_one():
    logits_TE = torch.full((E, E), -1.0, dtype=torch.float64)
    for token in range(E):  # token t uses experts t and t + 1: each expert has two tokens of E
        logits_TE[token, [token, (token + 1) % E]] = 0.1 + token
    routed = route(logits_TE)
    plain = oracle.l1_loss(logits_TE.tolist())
    assert l1_loss(routed, E, 2.0).item() == pytest.approx(plain, rel=1e-14)


def test_weights_are_continuous_and_pass_gradients_to_selected_gates_only():
    logits_TE = random_logits(2).requires_grad_()
    routed = route(logits_TE, max_experts=3)
    upstream_TE = torch.randn(S * B, E, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((routed.weights_TE * upstream_TE).sum(), logits_TE)
    assert torch.equal(gradient, upstream_TE * routed.map_TE)
    step = 1e-9
    for sign in (-step, step):  # token 1 has all logits at 0, where experts join and leave
        moved = route(logits_TE.detach() + sign).weights_TE
        assert (moved - route(logits_TE.detach()).weights_TE).abs().max() <= step * 1.001


def test_a_cut_gate_is_still_in_the_loss():
    logits_TE = torch.tensor([[3.0, 2.0, 1.0]], requires_grad=True)
    routed = route(logits_TE, max_experts=2)
    assert routed.map_TE.tolist() == [[True, True, False]]
    assert routed.prob_sums_BE.tolist() == [[3.0, 2.0, 1.0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("max_experts", [None, 2])
def test_a_token_with_nan_gets_the_first_expert_with_weight_nan(bad, max_experts):
    logits_TE = random_logits(3, torch.float32)
    logits_TE[5, 4] = bad
    routed = route(logits_TE, max_experts=max_experts)
    assert routed.not_finite.item() == 1
    clean = [t for t in range(S * B) if t != 5]
    assert routed.weights_TE[clean].isfinite().all()
    if bad != bad:
        assert routing.choices_of(routed.map_TE[5:6]) == [{0}]
        assert routed.weights_TE[5, 0].isnan() and (routed.weights_TE[5, 1:] == 0).all()
    else:
        assert (4 in routing.choices_of(routed.map_TE[5:6])[0]) == (bad > 0)


def test_tokens_have_to_fill_positions():
    with pytest.raises(ValueError, match="num_sequences 5"):
        route(random_logits(), num_sequences=5)
