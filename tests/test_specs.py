"""The --spec target, called as Megatron calls it: once for each model chunk."""

from types import SimpleNamespace

import pytest

from tests.moe import one_rank

pytestmark = pytest.mark.megatron


@pytest.fixture(autouse=True)
def megatron():
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()


@pytest.mark.parametrize(
    ("upstream", "expected"),
    [
        ({"moe_router_load_balancing_type": "aux_loss"}, ("seq_aux_loss", 1e-2)),
        ({"moe_router_load_balancing_type": "global_aux_loss"}, ("global_aux_loss", 1e-2)),
        (
            {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.5},
            ("seq_aux_loss", 0.5),
        ),
        ({"moe_router_load_balancing_type": "none"}, ("none", 0.0)),
    ],
)
def test_every_chunk_gets_the_same_settings(tmp_path, monkeypatch, upstream, expected):
    from megatron_dynmoe.specs import dynmoe_layer_spec

    file = tmp_path / "dynmoe.yaml"
    file.write_text("routing: top_p")
    monkeypatch.setenv("DYNMOE_CONFIG", str(file))
    config = one_rank.transformer_config(**upstream)
    for _chunk in range(2):
        spec = dynmoe_layer_spec(SimpleNamespace(transformer=config))
        router = spec.layer_specs[0].submodules.mlp.keywords["submodules"].router
        dynmoe = router.keywords["dynmoe"]
        assert (dynmoe.balance_loss, dynmoe.balance_loss_coeff) == expected


def test_without_settings_the_spec_says_what_to_set(monkeypatch):
    from megatron_dynmoe.specs import dynmoe_layer_spec

    monkeypatch.delenv("DYNMOE_CONFIG", raising=False)
    with pytest.raises(ValueError, match="DYNMOE_CONFIG is not set"):
        dynmoe_layer_spec(SimpleNamespace(transformer=one_rank.transformer_config()))


def test_the_baseline_is_upstreams_own_spec(tmp_path, monkeypatch):
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_dynmoe.specs import dynmoe_layer_spec

    file = tmp_path / "dynmoe.yaml"
    file.write_text("routing: top_k")
    monkeypatch.setenv("DYNMOE_CONFIG", str(file))
    config = one_rank.transformer_config()
    spec = dynmoe_layer_spec(SimpleNamespace(transformer=config))
    assert spec.layer_specs[0].submodules.mlp.func is MoELayer
    assert config.finalize_model_grads_func is None
