"""SeqTopK in a real router: what it chooses in training and in evaluation, and its threshold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dynmoe.layers.rules import LAYER_RULES
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank
from tests.oracles import routing as oracle

pytestmark = pytest.mark.megatron
S, B, D, E = 12, 3, 16, 8
MEAN, CAP = 1.3, 3


@pytest.fixture(autouse=True)
def world():
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()


def built(**settings):
    given = {"target_experts_per_token": MEAN, "max_experts_per_token": CAP} | settings
    dynmoe = DynMoEConfig(routing="seq_top_k", **given)
    sizes = {"num_experts": E, "hidden_size": D, "moe_ffn_hidden_size": 16}
    return one_rank.moe_layer(dynmoe, **sizes, init_method_std=0.25)


def hidden(seed: int, positions: int = S, sequences: int = B) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(positions, sequences, D, generator=generator)


def probs_of(router, hidden_SBD: Tensor) -> Tensor:
    return torch.nn.functional.linear(hidden_SBD, router.weight).softmax(dim=-1)


def choices_of(map_TE: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in map_TE]


@pytest.mark.parametrize("balance_loss", ["seq_aux_loss", "aux_loss", "none"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_sequence_spends_its_budget_on_its_best_scores(balance_loss, padded):
    router = built(balance_loss=balance_loss).router
    hidden_SBD = hidden(1)
    lengths = torch.tensor([S, S - 5, 1]) if padded else torch.tensor([S] * B)
    valid_SB = torch.arange(S).unsqueeze(-1) < lengths
    _, map_TE = router(hidden_SBD, padding_mask=~valid_SB if padded else None)
    map_SBE, probs_SBE = map_TE.view(S, B, E), probs_of(router, hidden_SBD)
    left_out = 0.0
    for b in range(B):
        choices, best = oracle.seq_top_k(
            probs_SBE[:, b].tolist(), MEAN, CAP, valid_SB[:, b].tolist()
        )
        assert choices_of(map_SBE[:, b]) == choices
        left_out += best
    total = sum(int(MEAN * length) for length in lengths.tolist())
    sums = router.counters.sums
    assert sums.assignments.sum() == map_TE.sum() == total
    assert sums.tokens == lengths.sum()
    assert not map_SBE.any(dim=-1).all(), "some token has no expert"
    assert router.counters.sums_W.tolist() == pytest.approx([left_out, B])


def test_with_a_cap_at_the_budget_it_is_megatrons_top_k():
    """The selection alone sets the two apart: by default also the weights are those of top-k."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    ours = built(target_experts_per_token=2, max_experts_per_token=2).router
    config = one_rank.transformer_config(E, D, moe_router_topk=2, moe_router_dtype="fp32")
    upstream = TopKRouter(config, get_default_pg_collection())
    upstream.weight.data.copy_(ours.weight)
    weights_TE, map_TE = ours(hidden(4))
    wanted_TE, wanted_map_TE = upstream(hidden(4))
    assert torch.equal(map_TE, wanted_map_TE)
    torch.testing.assert_close(weights_TE, wanted_TE)


@pytest.mark.parametrize("weights", ["raw", "renormalized"])
def test_weights_losses_and_gradients_are_those_of_the_loops(weights):
    router = built(weights=weights, balance_loss="aux_loss", balance_loss_coeff=0.5).router
    hidden_SBD = hidden(2)
    weights_TE, map_TE = router(hidden_SBD)
    (weights_TE * torch.arange(1, E + 1)).square().sum().backward()

    gate = router.weight.detach().double().requires_grad_()
    logits_TE = torch.nn.functional.linear(hidden_SBD.view(-1, D).double(), gate)
    probs = [oracle.softmax(list(row)) for row in logits_TE]
    choices = choices_of(map_TE)
    zero = [torch.zeros((), dtype=torch.float64)] * E
    expected_TE = torch.stack(
        [
            torch.stack(oracle.weights(row, chosen, weights == "renormalized") if chosen else zero)
            for row, chosen in zip(probs, choices, strict=True)
        ]
    )
    torch.testing.assert_close(weights_TE, expected_TE.float())
    balance = oracle.load_balance_loss(probs, choices)
    assert router.counters.sums.balance_loss.item() == pytest.approx(balance.item(), rel=1e-5)
    loss = (expected_TE * torch.arange(1, E + 1)).square().sum() + 0.5 * balance
    loss.backward()
    torch.testing.assert_close(router.weight.grad.double(), gate.grad, rtol=1e-4, atol=1e-5)
    assert set() in choices


def test_evaluation_does_not_look_ahead_and_training_does():
    layer = built()
    router = layer.router
    router.score_threshold.fill_(0.2)
    early, late = hidden(3), hidden(3)
    late[S // 2 :] = 3 * hidden(4)[S // 2 :]

    def first_half(batch: Tensor) -> Tensor:
        return router(batch)[1].view(S, B, E)[: S // 2]

    assert not torch.equal(first_half(early), first_half(late))
    layer.eval()
    assert torch.equal(first_half(early), first_half(late))
    expected_SBE = (probs_of(router, early) > 0.2) & (
        probs_of(router, early).argsort(dim=-1, descending=True).argsort(dim=-1) < CAP
    )
    assert torch.equal(router(early)[1].view(S, B, E), expected_SBE)


def test_inference_may_have_another_cap():
    layer = built(inference_max_experts_per_token=5)
    layer.router.score_threshold.fill_(0.05)
    assert layer.router(hidden(5))[1].sum(dim=-1).max() == CAP
    layer.eval()
    probs_TE = probs_of(layer.router, hidden(5)).view(-1, E)
    expected_T = (probs_TE > 0.05).sum(dim=-1).clamp(max=5)
    assert torch.equal(layer.router(hidden(5))[1].sum(dim=-1), expected_T)
    assert expected_T.max() == 5


@pytest.mark.parametrize("weights", ["raw", "renormalized"])
def test_an_exported_router_chooses_as_evaluations_do(weights):
    router = built(weights=weights).eval().router
    router.score_threshold.fill_(0.3)
    logits_TE = torch.nn.functional.linear(hidden(6), router.weight).flatten(end_dim=1)
    settings = {"weights": weights, "max_experts_per_token": CAP}
    chosen = LAYER_RULES["seq_top_k"].choose(logits_TE, router.state, settings)
    weights_TE, map_TE = router(hidden(6))
    assert torch.equal(chosen.map_TE, map_TE)
    assert torch.equal(chosen.weights_TE, weights_TE)
    assert not map_TE.any(dim=-1).all() and chosen.weights_TE.isfinite().all()


def test_the_threshold_is_the_mean_of_what_the_last_budgets_left_out(monkeypatch):
    """And with it an evaluation uses about the same mean number of experts."""
    monkeypatch.setattr("megatron_dynmoe.control.update.finished_iterations", lambda: 0)
    layer = built(max_experts_per_token=None)
    router, end_of_batch = layer.router, one_rank.end_of_batch(layer)
    positions = 512
    for step in range(2):
        batches = [hidden(10 * step + micro, positions) for micro in range(2)]
        for batch in batches:
            layer(batch)
        best = [
            probs_of(router, batch)[:, b].flatten().sort(descending=True).values
            for batch in batches
            for b in range(B)
        ]
        end_of_batch()
        left_out = [values[int(positions * MEAN)].item() for values in best]
        assert router.score_threshold.item() == pytest.approx(
            sum(left_out) / len(left_out), rel=1e-6
        )
    assert router.measured.item() == int(positions * MEAN) / positions
    layer.eval()
    layer(hidden(7, positions=4096))
    counted = router.evaluation_counters.sums
    assert counted.assignments.sum() / counted.tokens == pytest.approx(MEAN, rel=0.03)


def test_a_batch_of_padding_or_with_nan_leaves_the_threshold_as_it_is(monkeypatch):
    monkeypatch.setattr("megatron_dynmoe.control.update.finished_iterations", lambda: 0)
    layer = built()
    end_of_batch = one_rank.end_of_batch(layer)
    layer(hidden(1))
    end_of_batch()
    before = {name: value.clone() for name, value in layer.router.state.items()}
    layer.router(hidden(2), padding_mask=torch.ones(S, B, dtype=torch.bool))
    end_of_batch()
    assert layer.router.state == before
    spoilt = hidden(3)
    spoilt[0] = torch.nan
    layer(spoilt)
    end_of_batch()
    assert layer.router.state == before


def test_room_for_the_mean_holds_the_rows_of_every_batch():
    layer = built(row_buffer="target", backend="torch_native", max_experts_per_token=None)
    assert layer.router.dynmoe.row_buffer_margin == 0
    sums = layer.router.counters.sums
    layer(hidden(0))
    mean = float(sums.mean_experts)
    for seed in range(1, 6):
        counted, _ = layer(hidden(seed))
        layer.token_dispatcher.make_room(mean, layer.router.counters)
        assert torch.equal(layer(hidden(seed))[0], counted)
        layer.token_dispatcher.count_rows()
    assert sums.overflows == 0
