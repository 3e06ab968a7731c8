"""A run's settings, settled in one call: what counts, and what it refuses by name."""

from argparse import Namespace

import pytest

from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.messages.refusals import SettingError
from tests.moe import one_rank

pytestmark = pytest.mark.megatron

TARGET = {"routing": "dtop_p", "target_experts_per_token": 2.0}
WITHOUT_WAITING = TARGET | {"row_buffer": "target"}


def settled(dynmoe, args=None, **transformer):
    from megatron_dynmoe.model.settled import settle_run

    config = one_rank.transformer_config(moe_router_dtype="fp32", **transformer)
    return settle_run(DynMoEConfig(**dynmoe).resolve(4), config, args=args)


def arguments(**changed):
    return Namespace(**({"optimizer": "adam", "seed": 1234} | changed))


def test_the_optimizer_decides_on_the_experts():
    assert "experts" not in settled(TARGET, arguments()).backend.kept
    of_another = settled(TARGET, arguments(optimizer="muon")).backend
    assert of_another.kept["experts"] == "--optimizer muon"
    # One's own loop has no arguments, and upstream's default is Adam.
    assert settled(TARGET).backend == settled(TARGET, arguments()).backend


def test_the_seed_of_the_run_draws_the_targets():
    drawn = TARGET | {"target_experts_per_token": "uniform(1,3)"}
    targets = {
        seed: [settled(drawn, arguments(seed=seed)).dynmoe.drawn_target.at(step) for step in (0, 1)]
        for seed in (1, 2)
    }
    assert targets[1] != targets[2]
    assert settled(drawn, arguments(seed=1)).dynmoe.drawn_target.seed == 1


def test_settling_twice_says_the_same_and_top_k_has_no_rule():
    once = settled(TARGET)
    again = settled(once.dynmoe.to_dict())
    assert again.dynmoe == once.dynmoe and again.controller == once.controller
    assert once.to_dict()["dynamic_routing"] == once.dynmoe.to_dict()
    stock = settled({"routing": "top_k"})
    assert stock.rule is None and stock.controller is None


@pytest.mark.parametrize(
    ("gemm", "upstream", "reason", "remedy"),
    [
        ("a loop", {}, "run in a loop on this device", "bf16 on Hopper"),
        ("grouped", {"moe_token_dispatcher_type": "allgather"}, "is allgather", "use alltoall"),
        ("grouped", {"expert_model_parallel_size": 2}, "--expert-model-parallel-size 2", "leave"),
    ],
)
def test_a_buffer_of_rows_is_refused_if_the_host_has_to_count_them(
    monkeypatch, gemm, upstream, reason, remedy
):
    from megatron_dynmoe.backends import choice

    monkeypatch.setattr(choice, "gemm_of", lambda _: gemm)
    assert settled(TARGET, **upstream)  # a measured buffer is never refused
    with pytest.raises(SettingError) as refused:
        settled(WITHOUT_WAITING, **upstream)
    for part in ("row_buffer", "target", reason, remedy):
        assert part in str(refused.value)


def test_the_busiest_rank_is_held_only_if_its_rows_are_counted():
    busiest = TARGET | {"controlled_quantity": "busiest_rank"}
    parallel = {"expert_model_parallel_size": 2}
    assert settled(busiest, **parallel).dynmoe.controlled_quantity == "busiest_rank"
    with pytest.raises(SettingError, match=r"allgather.*use alltoall"):
        settled(busiest, moe_token_dispatcher_type="allgather", **parallel)
