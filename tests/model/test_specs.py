"""The --spec target, called as Megatron calls it: once for each model chunk."""

from types import SimpleNamespace

import pytest
import yaml

from tests.moe import one_rank

pytestmark = pytest.mark.megatron


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


@pytest.mark.parametrize("backend", ["torch_native", "local"])
def test_upstreams_default_contradicts_no_back_end(tmp_path, monkeypatch, backend):
    from megatron_dynmoe.backends import choice
    from megatron_dynmoe.specs import dynmoe_layer_spec

    monkeypatch.setattr(choice, "has_transformer_engine", lambda: True)
    file = tmp_path / "dynmoe.yaml"
    file.write_text(f"routing: top_p\nbackend: {backend}")
    monkeypatch.setenv("DYNMOE_CONFIG", str(file))
    config = one_rank.transformer_config(transformer_impl="transformer_engine")
    dynmoe_layer_spec(SimpleNamespace(transformer=config))
    assert config.transformer_impl == "local"


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


def test_a_spec_is_made_of_settled_settings_and_changes_nothing():
    import copy

    from megatron_dynmoe.model.settled import settle_run
    from megatron_dynmoe.model.spec import layer_spec
    from megatron_dynmoe.settings.config import DynMoEConfig

    config = one_rank.transformer_config(moe_router_dtype="fp32")
    before = copy.copy(vars(config))
    settled = settle_run(DynMoEConfig(routing="top_p").resolve(4), config)
    specs = [layer_spec(SimpleNamespace(transformer=config), settled=settled) for _ in range(2)]
    assert vars(config) == before
    routers = [spec.layer_specs[0].submodules.mlp.keywords["submodules"].router for spec in specs]
    assert (
        routers[0].keywords
        == routers[1].keywords
        == {
            "dynmoe": settled.dynmoe,
            "rule": settled.rule,
            "initial_map": None,
        }
    )
    assert settled.dynmoe.threshold == 0.4 and settled.controller is None


@pytest.fixture
def calls(monkeypatch):
    """The calls of what settles a part of a run's settings, by name."""
    from megatron_dynmoe.backends import choice
    from megatron_dynmoe.model import settled
    from megatron_dynmoe.settings.config import DynMoEConfig

    called = []

    def counting(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    counting(DynMoEConfig, "resolve")
    counting(settled, "settle")
    counting(choice, "choose_backend")
    counting(choice, "choose_parts")
    return called


ONCE = ["choose_backend", "choose_parts", "resolve", "settle"]


@pytest.mark.parametrize("routing", ["top_p", "dtop_p"])
def test_settings_are_settled_once_however_many_chunks_there_are(
    tmp_path, monkeypatch, calls, routing
):
    from megatron_dynmoe import specs

    file = tmp_path / "dynmoe.yaml"
    file.write_text(
        f"routing: {routing}\n" + "target_experts_per_token: 2\n" * (routing == "dtop_p")
    )
    monkeypatch.setenv("DYNMOE_CONFIG", str(file))
    config = one_rank.transformer_config()
    for stage in range(2):
        specs.dynmoe_layer_spec(SimpleNamespace(transformer=config), stage)
    assert sorted(calls) == ONCE


def test_the_entry_point_settles_once_what_trains_and_is_written(tmp_path, monkeypatch, calls):
    import megatron.training.arguments as megatron_arguments

    from megatron_dynmoe.jobs.recipes import recipe_flags
    from megatron_dynmoe.training import loop, run_directory

    monkeypatch.delenv("DYNMOE_CONFIG", raising=False)
    monkeypatch.setattr(
        megatron_arguments,
        "set_global_variables",  # would build the tokenizer, of which only the size counts here
        lambda args: setattr(args, "padded_vocab_size", 128),
    )
    monkeypatch.setattr(run_directory, "get_tensorboard_writer", lambda: None)
    run_dir = str(tmp_path / "run")
    monkeypatch.setattr(
        "sys.argv", ["pretrain", *recipe_flags("smoke"), "--run-dir", run_dir, "--mock-data"]
    )
    trained = []

    def pretrain(config, *_, **__):
        trained.append(config.model.transformer_layer_spec.keywords["settled"])
        raise KeyboardInterrupt  # before a step: what is written stays

    monkeypatch.setattr(loop, "pretrain", pretrain)
    with pytest.raises(KeyboardInterrupt):
        loop.train(0.0)
    assert sorted(calls) == ONCE
    written = yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text())
    assert {name: written[name] for name in trained[0].to_dict()} == trained[0].to_dict()
    assert written["back_end"]["backend"] == "torch_native"
