"""Which patterns of layers are taken, what follows from them, and how others are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dynmoe.settings.hybrid_pattern import (
    adapt_pattern,
    check_losses_of_stages,
    layers_of_kinds,
)
from megatron_dynmoe.settings.messages.refusals import FlagError


def arguments(pattern: str | None, **changed: Any) -> SimpleNamespace:
    given: dict[str, Any] = {
        "hybrid_layer_pattern": pattern,
        "hybrid_override_pattern": None,
        "pipeline_model_parallel_size": 1,
        "multi_latent_attention": False,
        "use_rope_scaling": False,
        "position_embedding_type": "rope",
        "mtp_num_layers": None,
        "num_layers": None,
        "num_experts": 8,
        "moe_layer_freq": 1,
    }
    return SimpleNamespace(**(given | changed))


def test_layers_follow_from_the_pattern() -> None:
    args = arguments("*E|*-", pipeline_model_parallel_size=2)
    adapt_pattern(args)
    assert (args.num_layers, args.moe_layer_freq) == (4, [0, 1, 0, 0])
    adapt_pattern(args)  # as with --use-checkpoint-args
    assert (args.num_layers, args.moe_layer_freq) == (4, [0, 1, 0, 0])


def test_without_experts_or_a_pattern_the_frequency_is_as_it_was() -> None:
    dense, none = arguments("*-*-", num_experts=None), arguments(None, num_layers=3)
    adapt_pattern(dense)
    adapt_pattern(none)
    assert (dense.num_layers, dense.moe_layer_freq) == (4, 1)
    assert (none.num_layers, none.moe_layer_freq) == (3, 1)


@pytest.mark.parametrize(
    ("pattern", "changed", "said"),
    [
        ("M*E", {}, "M is Mamba, which has no CPU kernel"),
        ("*EG", {}, "G is gated delta net"),
        ("DE", {}, "D is sparse latent attention"),
        ("+E", {}, "[+] is latent attention"),
        ("*E/*E", {}, "/ is the start of multi-token prediction"),
        ("*X", {}, "X is no kind of layer"),
        ("", {}, "a model without layers"),
        ("*E|*E", {}, "--pipeline-model-parallel-size is 1"),
        ("*E||*E", {"pipeline_model_parallel_size": 3}, "a layer or more in each"),
        ("*E", {"num_layers": 4}, "--num-layers is 4, .* has 2 layers"),
        ("*E", {"num_experts": None}, "--num-experts is not given, .* has 1 layers with experts"),
        ("*-", {}, "--num-experts is 8, .* has 0 layers with experts"),
        ("*E", {"moe_layer_freq": 2}, "--moe-layer-freq is 2"),
        ("*E", {"multi_latent_attention": True}, "--multi-latent-attention is given"),
        ("*E", {"use_rope_scaling": True}, "--use-rope-scaling is given"),
        (None, {"hybrid_override_pattern": "*E"}, "--hybrid-layer-pattern by now"),
    ],
)
def test_what_is_not_taken_is_named(pattern: str, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(FlagError, match=said):
        adapt_pattern(arguments(pattern, **changed))


@pytest.mark.parametrize(
    ("pattern", "stages", "changed", "said"),
    [
        ("*E|*-", 2, {"moe_router_load_balancing_type": "aux_loss"}, "is aux_loss.* give none"),
        ("*E*-", 2, {"moe_z_loss_coeff": 1e-3}, "is 0.001.* leave it out"),
        ("*E|*-", 2, {}, None),
        ("*E|*E", 2, {"moe_z_loss_coeff": 1e-3}, None),
        ("*E*-", 1, {"moe_z_loss_coeff": 1e-3}, None),
        ("*-|*-", 2, {"moe_router_load_balancing_type": "aux_loss"}, None),
    ],
)
def test_upstreams_losses_need_experts_in_every_stage(pattern, stages, changed, said) -> None:
    losses = {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": None} | changed
    args = arguments(pattern, pipeline_model_parallel_size=stages, **losses)
    if said is None:
        check_losses_of_stages(args)
        return
    with pytest.raises(FlagError, match=said):
        check_losses_of_stages(args)


def test_each_kind_has_its_layers() -> None:
    every, sparse = {0, 1, 2, 3}, (False, True, False, False)
    assert layers_of_kinds("*E|*-", sparse) == {
        "attention": {0, 2},
        "mlp": {1, 3},
        "experts": {1},
        "dense": {3},
    }
    assert layers_of_kinds(None, sparse) == {
        "attention": every,
        "mlp": every,
        "experts": {1},
        "dense": {0, 2, 3},
    }
