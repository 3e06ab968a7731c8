"""What a training gets beside its model: the hook of a global batch, and lines in the log."""

from argparse import Namespace

import pytest

from megatron_dynmoe.settings.config import DynMoEConfig
from tests.moe import one_rank

pytestmark = pytest.mark.megatron


def settled_with(config, **dynmoe):
    from megatron_dynmoe.model.settled import settle_run

    return settle_run(DynMoEConfig(**dynmoe).resolve(4), config)


def test_the_hook_runs_what_was_there_before(monkeypatch):
    from megatron_dynmoe.control.update import GlobalBatchUpdate
    from megatron_dynmoe.model.prepare import prepare_training

    called = []
    config = one_rank.transformer_config()
    config.finalize_model_grads_func = lambda *args, **kwargs: called.append(args)
    settled, args = settled_with(config, routing="top_p"), Namespace()
    prepare_training(settled, config, args)
    assert isinstance(config.finalize_model_grads_func, GlobalBatchUpdate)
    assert config.moe_router_dtype == "fp32"
    assert args.moe_dynamic_settings == settled.dynmoe.to_dict()
    config.finalize_model_grads_func.finalize("the model")
    assert called == [("the model",)]


def test_the_baseline_is_left_alone():
    from megatron_dynmoe.model.prepare import describe, prepare_training

    config, args = one_rank.transformer_config(), Namespace()
    settled = settled_with(config, routing="top_k")
    prepare_training(settled, config, args)
    assert config.finalize_model_grads_func is None and config.moe_router_dtype is None
    assert vars(args) == {}
    assert len(list(describe(settled, config))) == 1  # the back end


@pytest.mark.parametrize(("factor", "warns"), [(1.0, False), (4.0, True)])
def test_gains_that_may_become_unstable_are_warned_of(factor, warns):
    from megatron_dynmoe.model.prepare import describe

    config = one_rank.transformer_config()
    dtop_p = {"routing": "dtop_p", "target_experts_per_token": 2.0}
    found = settled_with(config, **dtop_p).controller
    gains = {name: factor * getattr(found, name) for name in ("proportional_gain", "integral_gain")}
    lines = list(describe(settled_with(config, **dtop_p, **gains), config))
    assert any(line.startswith("WARNING: proportional_gain") for line in lines) == warns
    assert any(line.startswith("> dynamic routing: ") for line in lines)


def test_the_log_names_the_first_threshold_of_every_knot():
    from megatron_dynmoe.model.prepare import describe

    config = one_rank.transformer_config()
    settled = settled_with(config, routing="dtop_p", target_experts_per_token="uniform(1,3)")
    (line,) = (line for line in describe(settled, config) if "targets are drawn" in line)
    for knot in settled.controller.knots:
        assert f"for {knot:.3g}" in line
