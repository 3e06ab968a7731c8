"""The rule relu in real Megatron, on one rank: its loss, its two laws, tokens without an expert."""

import itertools
import math

import pytest
import torch

from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import FlagError, SettingError
from tests.moe import one_rank
from tests.oracles import relu as oracle

pytestmark = pytest.mark.megatron
S, B, E, D = 16, 4, 8, 16


@pytest.fixture(autouse=True)
def world(monkeypatch):
    one_rank.world_of_one()
    monkeypatch.setattr("megatron_dynmoe.control.update.finished_iterations", lambda: 0)
    yield
    one_rank.forget_global_state()


def relu(target: float = 2.0, **settings) -> DynMoEConfig:
    return DynMoEConfig(routing="relu", target_experts_per_token=target, **settings)


def layer_of(dynmoe: DynMoEConfig):
    """A layer, and what ends its global batch."""
    return one_rank.steered(dynmoe, num_experts=E, hidden_size=D)


def hidden(seed: int, positions: int = S) -> torch.Tensor:
    return torch.randn(positions, B, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("padded", [False, True])
def test_the_gradient_of_the_loss_is_the_papers(padded):
    router = layer_of(relu(1.5, initial_threshold=-1.0))[0].router
    tokens = hidden(0)
    padding = (torch.arange(S * B) % 3 == 0).view(S, B) if padded else None
    weights_TE, map_TE = router(tokens, padding)
    (0 * weights_TE).sum().backward()

    keep_T = torch.ones(S * B, dtype=torch.bool) if padding is None else ~padding.view(-1)
    gate = router.weight.detach().double().requires_grad_()
    logits_TE = tokens.view(-1, D).double()[keep_T] @ gate.T
    choices = [oracle.choice(row) for row in logits_TE.tolist()]
    assert [set(row.nonzero().flatten().tolist()) for row in map_TE[keep_T]] == choices
    rows = [list(row.unbind()) for row in logits_TE]
    (0.1 * oracle.balanced_l1_loss(rows, choices, 1.5)).backward()
    torch.testing.assert_close(router.weight.grad, gate.grad.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("law", ["pi", "sign"])
def test_each_law_takes_the_count_of_a_learning_gate_to_the_target_and_turns(law):
    """The task asks for larger gates; lambda grows until they fall, and falls when too few are."""
    layer, end_of_batch = layer_of(relu(2.0, control_law=law, initial_threshold=-5.0))
    router, means, knobs = layer.router, [], []
    optimizer = torch.optim.Adam(router.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for step in range(150):
        # What all tokens have in common can close all gates; without it, half of them stay open.
        weights_TE, _ = router(hidden(step, positions=64) + 0.5)
        (-1e-3 * weights_TE.sum() / len(weights_TE)).backward()
        sums = router.counters.sums
        means.append((sums.assignments.sum() / sums.tokens).item())
        knobs.append(router.log10_lambda.item())
        end_of_batch()
        optimizer.step()
        optimizer.zero_grad()
    crossed = next(step for step, mean in enumerate(means) if mean < 2)
    assert means[0] > 3 and max(means) > 4  # dense, and denser before lambda is felt
    assert knobs[crossed] > knobs[0] + 1
    assert min(knobs[crossed + 1 :]) < knobs[crossed]
    for step, (now, after) in enumerate(itertools.pairwise(knobs)):
        if law == "sign":
            moved = math.log10(1.2) * (1 if means[step] > 2 else -1)
            assert after - now == pytest.approx(moved, abs=1e-5)
        else:
            errors = [min(mean / 2 - 1, 1) for mean in means[: step + 1]]
            want = -5 + 0.5 * errors[-1] + 0.08 * sum(errors)
            assert after == pytest.approx(want, abs=1e-4)


def test_a_token_may_have_no_expert():
    layer, end_of_batch = layer_of(relu())
    tokens = hidden(2)
    tokens[3:7] = 0  # all of its gates are zero
    tokens.requires_grad_()
    output, _ = layer(tokens)
    assert (output[3:7] == 0).all()
    assert (output[:3] != 0).any()
    output.square().sum().backward()
    assert tokens.grad.isfinite().all()
    assert layer.router.weight.grad.isfinite().all()
    end_of_batch()
    assert 0 < layer.router.measured.item() < E


def test_a_whole_batch_may_have_no_expert():
    layer, end_of_batch = layer_of(relu(initial_threshold=-4.0))
    tokens = torch.zeros(S, B, D, requires_grad=True)
    output, _ = layer(tokens)
    assert (output == 0).all()
    output.sum().backward()
    before = layer.router.log10_lambda.item()
    end_of_batch()
    assert layer.router.measured.item() == 0
    assert layer.router.log10_lambda.item() < before  # the loss gives way


def test_a_cap_keeps_the_largest_gates():
    router = layer_of(relu(max_experts_per_token=3))[0].router
    tokens = hidden(3)
    weights_TE, map_TE = router(tokens)
    logits_TE = (tokens.view(-1, D) @ router.weight.T).tolist()
    want = [oracle.choice(row, 3) for row in logits_TE]
    assert [set(row.nonzero().flatten().tolist()) for row in map_TE] == want
    assert ((weights_TE > 0) == map_TE).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"threshold": 0.4}, "threshold is 0.4.*does not have.*leave it out"),
        ({"normalization": "drn"}, "normalization is 'drn'.*does not have"),
        ({"weights": "renormalized"}, "weights is 'renormalized'.*does not have"),
        ({"dynamic_loss_coeff": 1e-3}, "dynamic_loss_coeff is 0.001.*does not have"),
        ({"balance_loss_coeff": 1e-3}, "balance_loss_coeff is 0.001.*does not have"),
        ({"inference_threshold": 0.3}, "inference_threshold is 0.3.*does not have"),
        ({"balance_loss": "none"}, "its gradient is what holds the count: use aux_loss"),
        ({"initial_threshold": 11.0}, "log10 of the L1 loss's coefficient"),
        ({"control_law": "sign", "proportional_gain": 1.0}, "control_law is 'sign': remove prop"),
        ({"target_experts_per_token": "uniform(1,3)"}, "uniform"),
        (
            {"target_experts_per_token": 0},
            "a token may use none and at most 8 .all experts., so use more than 0 to 8",
        ),
        (
            {"target_experts_per_token": 9},
            "a token may use none and at most 8 .all experts., so use more than 0 to 8",
        ),
        ({"integral_gain": "auto"}, r"integral_gain is 'auto'.*leave it out \(0.08\)"),
        ({"initial_threshold": "auto"}, r"initial_threshold is 'auto'.*leave it out \(-8\)"),
        (
            {"control_law": "sign", "integral_gain": "auto"},
            r"integral_gain is 'auto'.*leave it out \(0.0791812\)",
        ),
        (
            {"control_law": "sign", "proportional_gain": "auto"},
            "is 'auto' and control_law is 'sign'",
        ),
        (
            {"min_threshold": -4},
            r"^min_threshold is -4.0, and initial_threshold is -8.0 by default: give one between",
        ),
        ({"max_threshold": -9}, "^max_threshold is -9.0, and initial_threshold is -8.0 by default"),
        ({"integral_gain": 0.0}, "use a positive number"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(settings, message):
    with pytest.raises(SettingError, match=message):
        DynMoEConfig(**({"routing": "relu", "target_experts_per_token": 2} | settings)).resolve(8)


def test_z_loss_is_refused_by_its_flag():
    with pytest.raises(FlagError, match=r"moe-z-loss-coeff is 0.001.*relu.*below zero.*leave it"):
        one_rank.moe_layer(relu(), num_experts=E, hidden_size=D, moe_z_loss_coeff=1e-3)


def test_the_law_is_a_setting_of_relu_alone():
    with pytest.raises(SettingError, match=r"control_law is 'sign'.*set routing to 'relu'"):
        one_rank.moe_layer(
            DynMoEConfig(routing="dtop_p", target_experts_per_token=2, control_law="sign"),
            num_experts=E,
        )
