"""Expert thresholds in a Megatron layer: steered, counted, saved, and left alone if need be."""

from __future__ import annotations

import pytest
import torch

from megatron_dynmoe.layers.rules import chooser
from megatron_dynmoe.moe.rules import RULES
from megatron_dynmoe.routing.rules import quantiles
from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import SettingError
from tests.moe import one_rank

pytestmark = pytest.mark.megatron
E, D = 8, 16


@pytest.fixture(autouse=True)
def world(monkeypatch):
    one_rank.world_of_one()
    monkeypatch.setattr("megatron_dynmoe.control.update.finished_iterations", lambda: 0)
    yield
    one_rank.forget_global_state()


def settings(**more) -> DynMoEConfig:
    return DynMoEConfig(routing="expert_threshold", **({"target_experts_per_token": 2.0} | more))


def steered(dynmoe: DynMoEConfig, **model):
    """A layer, and what ends its global batch."""
    return one_rank.steered(dynmoe, num_experts=E, hidden_size=D, **model)


def hidden(seed: int, tokens: int = 256) -> torch.Tensor:
    return torch.randn(tokens // 4, 4, D, generator=torch.Generator().manual_seed(seed))


def state(router) -> dict[str, torch.Tensor]:
    names = (*RULES["expert_threshold"].entries, "integral", "measured")
    return {name: router.get_buffer(name).clone() for name in names}


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_first_thresholds_give_the_target_at_every_scale_of_the_gate():
    for std, normalization in ((0.02, "none"), (0.5, "none"), (0.5, "drn")):
        layer, _ = steered(settings(normalization=normalization), init_method_std=std)
        assert layer.router.share.item() == pytest.approx(2 / E, rel=1e-3)
        layer(hidden(0, 4096))
        sums = layer.router.counters.sums
        assert float(sums.mean_experts) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("more", [{}, {"max_experts_per_token": 3}, {"normalization": "drn"}])
def test_the_controller_holds_the_target_while_every_expert_takes_its_share(more):
    layer, end_of_batch = steered(settings(**more), init_method_std=0.3)
    layer.router.thresholds.fill_(0.0)  # half of all tokens for each expert
    means = []
    for step in range(70):
        if step == 30:  # the gate changes all at once
            layer.router.weight.data.add_(0.1 * hidden(99, 4 * E)[:E, 0])
        layer(hidden(step, 1024))
        sums = layer.router.counters.sums
        means.append(float(sums.mean_experts))
        shares_E = sums.assignments / sums.tokens
        end_of_batch()
    assert means[0] > 2.5
    for settled in (means[20:30], means[-15:]):
        assert sum(settled) / len(settled) == pytest.approx(2.0, rel=0.02)
    assert shares_E.min() > 0.5 * shares_E.mean() and shares_E.max() < 1.5 * shares_E.mean()
    assert layer.router.batches.item() == 70
    assert set(layer.router.state_dict()) >= {"share", "thresholds", "batches", "integral"}


def test_thresholds_are_those_of_all_tokens_of_the_batch_however_it_is_split():
    batch, results = hidden(1), []
    for parts in (1, 4):
        torch.manual_seed(5)
        layer, end_of_batch = steered(settings())
        for part in batch.chunk(parts):
            layer(part)
        end_of_batch()
        results.append(state(layer.router))
    assert same(*results)


def test_evaluation_recomputation_and_bad_batches_change_nothing():
    layer, end_of_batch = steered(settings())
    layer(hidden(1))
    end_of_batch()
    before = state(layer.router)
    layer.eval()
    first = layer(hidden(2))[0]
    layer.train()
    with torch.no_grad():  # the first pass of recomputation
        layer(hidden(3))
    assert not layer.router.counters.sums_W.any()
    assert same(before, state(layer.router))
    layer.eval()
    assert torch.equal(layer(hidden(2))[0], first)
    layer.train()
    spoilt = hidden(4)
    spoilt[0, 0, 0] = torch.inf
    layer(spoilt)
    end_of_batch()
    assert same(before, state(layer.router))
    layer(hidden(5))
    end_of_batch()
    assert not torch.equal(before["thresholds"], layer.router.thresholds)


def test_a_step_that_the_optimizer_skips_changes_nothing():
    layer, end_of_batch = steered(settings())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    scaler = type("Scaler", (), {"chained_optimizers": [optimizer], "scale": lambda s, x: x})()
    layer.config.grad_scale_func = scaler.scale
    before = state(layer.router)
    layer(hidden(1))
    end_of_batch()
    assert same(before, state(layer.router))  # until the step
    layer(hidden(2))
    end_of_batch()  # the first batch was skipped
    optimizer.step()
    after = state(layer.router)
    assert after["batches"].item() == 1
    counts = quantiles.count(
        torch.nn.functional.linear(hidden(2).flatten(0, 1), layer.router.weight),
        before["thresholds"],
        None,
    )
    expected = quantiles.next_thresholds(
        before["thresholds"], counts.view(E, -1), before["share"], after["share"], 1.0
    )
    assert torch.equal(after["thresholds"], expected)


def test_a_checkpoint_brings_the_thresholds_back_and_bf16_does_not_round_them():
    layer, end_of_batch = steered(settings())
    for seed in range(3):
        layer(hidden(seed))
        end_of_batch()
    saved = {name: value.clone() for name, value in layer.router.state_dict().items()}
    torch.manual_seed(9)
    other, _ = steered(settings())
    other.router.load_state_dict(saved)
    other.router.bfloat16()
    assert other.router.thresholds.dtype == torch.float32
    assert same(state(layer.router), state(other.router))


def test_an_exported_model_chooses_as_evaluations_do():
    for more in ({}, {"max_experts_per_token": 4, "weights": "renormalized"}):
        dynmoe = settings(**more).resolve(E)
        layer, end_of_batch = steered(dynmoe)
        for seed in range(3):
            layer(hidden(seed))
            end_of_batch()
        layer.eval()
        router, batch = layer.router, hidden(7)
        weights_TE, map_TE = router(batch)
        config = {
            "routing": "expert_threshold",
            "weights": dynmoe.weights,
            "rule_settings": {"threshold_decay": dynmoe.threshold_decay},
            "router_state": {name: [value.tolist()] for name, value in router.state.items()},
        }
        choose = chooser(config, 0, dynmoe.max_experts_per_token, torch.device("cpu"))
        chosen = choose(torch.nn.functional.linear(batch.flatten(0, 1), router.weight))
        assert torch.equal(chosen.map_TE, map_TE) and not map_TE.any(-1).all()
        assert torch.equal(chosen.weights_TE, weights_TE)


def test_settings_that_it_has_not_are_refused_by_name():
    for more, message in (
        ({"threshold": 0.4}, "threshold is 0.4.*does not have.*leave it out"),
        ({"inference_threshold": 0.4}, "inference_threshold.*does not have"),
        ({"initial_threshold": 1.5}, "share of all tokens that an expert takes"),
        ({"threshold_decay": 1.0}, "threshold_decay is 1.0.*below 1"),
        ({"balance_loss_coeff": 0.01}, "balance_loss_coeff.*balance_loss is 'none'"),
        ({"target_experts_per_token": "uniform(1,3)"}, "cannot follow a target"),
        ({"target_experts_per_token": 0}, "use more than 0 to 8"),
    ):
        with pytest.raises(SettingError, match=message):
            settings(**more).resolve(E)
    assert settings(balance_loss="aux_loss").resolve(E).balance_loss_coeff == 1e-2
    with pytest.raises(SettingError, match=r"threshold_decay.*does not have"):
        DynMoEConfig(routing="top_p", threshold_decay=0.9).resolve(E)
