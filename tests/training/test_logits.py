"""The check after a micro-batch's forward pass, on layers without a training loop."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank

pytestmark = pytest.mark.megatron


@pytest.fixture(autouse=True)
def megatron():
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()


def check(monkeypatch, is_checked: bool, bad_layers: tuple[int, ...] = ()) -> None:
    """Run three MoE layers' routers, some on NaN, and check them, with a dense layer beside."""
    from megatron_dynmoe.training import logits

    layers = [one_rank.moe_layer(DynMoEConfig(routing="top_p")) for _ in range(3)]
    for number, layer in enumerate(layers, 1):
        layer.set_layer_number(number)
        hidden = torch.randn(5, 1, 8)
        hidden[0] *= torch.nan if number in bad_layers else 1
        layer.router(hidden)
    mlps = [*layers, torch.nn.Linear(1, 1)]
    decoder = SimpleNamespace(layers=[SimpleNamespace(mlp=mlp) for mlp in mlps])
    args = SimpleNamespace(check_for_nan_in_loss_and_grad=is_checked, curr_iteration=41)
    monkeypatch.setattr(logits, "get_args", lambda: args)
    logits.check_logits(SimpleNamespace(decoder=decoder, training=True))


def test_the_earliest_layer_is_named_first(monkeypatch):
    message = r"iteration 42, rank 0: .* layer 2, for 1 token of a micro-batch.* \(3\)"
    with pytest.raises(RuntimeError, match=message):
        check(monkeypatch, is_checked=True, bad_layers=(3, 2))


def test_good_logits_and_an_unwanted_check_pass(monkeypatch):
    check(monkeypatch, is_checked=True)
    check(monkeypatch, is_checked=False, bad_layers=(2,))
