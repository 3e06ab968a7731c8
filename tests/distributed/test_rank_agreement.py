"""``--moe-dynamic-check-ranks``: a rank whose routers differ stops the run, on every rank."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_dynmoe.control.update import GlobalBatchUpdate, routers_of
from tests.distributed.faults import replaced
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron, pytest.mark.long]

CHECKED = f"{TINY} --train-iters 4 --moe-dynamic-check-ranks 2"
TOP_P = "--moe-dynamic-routing top_p"
EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
BY_LAYER = "--moe-dynamic-scope layer"


@contextlib.contextmanager
def changed(recorder: Any, change: Callable, rank: int, layer: int) -> Iterator[None]:
    """Change a router of one rank once the fourth step has run forward and backward."""
    update = GlobalBatchUpdate.__call__

    def changing(self, model, *args, **kwargs):
        if torch.distributed.get_rank() == rank and len(recorder.result["steps"]) == 3:
            with torch.no_grad():
                for router in routers_of(model):
                    if router.layer_number == layer:
                        change(router)
        update(self, model, *args, **kwargs)

    with replaced(GlobalBatchUpdate, "__call__", changing):
        yield


def threshold_of_rank_1(recorder: Any):
    return changed(recorder, lambda router: router.threshold.add_(2**-24), rank=1, layer=2)


def integral_of_stage_1(recorder: Any):
    return changed(recorder, lambda router: router.integral.add_(0.125), rank=1, layer=4)


def theta_of_rank_1(recorder: Any):
    return changed(recorder, lambda router: router.theta_offset.fill_(float("nan")), 1, layer=1)


def gate_of_rank_3(recorder: Any):
    return changed(recorder, lambda router: router.weight[1, 2:3].mul_(-1), rank=3, layer=4)


@contextlib.contextmanager
def next_threshold_of_rank_1(recorder: Any) -> Iterator[None]:
    """Of the third layer, in the fourth step: each layer has its own."""
    stage = GlobalBatchUpdate._stage

    def staged(self, *given):
        stage(self, *given)
        if torch.distributed.get_rank() == 1 and len(recorder.result["steps"]) == 3:
            self._staged[0][2] += 0.25

    with replaced(GlobalBatchUpdate, "_stage", staged):
        yield


def case(name: str, ranks: int, flags: str, hook: Callable | None = None) -> Case:
    hooks = (f"{__name__}:{hook.__name__}",) if hook else ()
    return add(Case(f"agreement_{name}", ranks, f"{CHECKED} {flags}", hooks=hooks))


# Case: what differs, in which layer, on which rank.
DIFFERENT = {
    case("dp2", 2, DTOP_P, threshold_of_rank_1): ("threshold", 2, 1),
    case("ep2", 2, f"{TOP_P} {EP2}", threshold_of_rank_1): ("threshold", 2, 1),
    case("pp2", 2, f"{DTOP_P} {PP2}", integral_of_stage_1): ("integral", 4, 1),
    case("theta", 2, f"{DTOP_P} {EP2} --bf16", theta_of_rank_1): ("theta", 1, 1),
    case("gate", 4, f"{DTOP_P} {PP2} {EP2} --bf16", gate_of_rank_3): ("gate", 4, 3),
    case("next", 2, f"{DTOP_P} {EP2} {BY_LAYER}", next_threshold_of_rank_1): (
        "next threshold",
        3,
        1,
    ),
}
AGREEING = [
    case("good_dp2", 2, f"{DTOP_P} --use-distributed-optimizer"),
    case("good_pp2_ep2", 4, f"{DTOP_P} {PP2} {EP2} --bf16"),
    case("good_by_layer", 2, f'{DTOP_P} {PP2} {BY_LAYER} --moe-layer-freq "[1,1,0,0]"'),
    case("good_tp2", 2, f"{DTOP_P} --tensor-model-parallel-size 2 --sequence-parallel "
         "--expert-tensor-parallel-size 1"),
]  # fmt: skip


@pytest.mark.parametrize("different", DIFFERENT, ids=lambda case: case.name)
def test_every_rank_stops_and_names_the_one_that_differs(results: Results, different: Case):
    quantity, layer, rank = DIFFERENT[different]
    for result in results.any(different).ranks:
        message = result["error"].strip().splitlines()[-1]
        assert re.match(
            rf"RuntimeError: iteration 4: {quantity} of layer {layer} is \S.* on rank {rank}, and "
            r"\S.*(elsewhere|on other ranks)\. .*--moe-dynamic-check-ranks.*resume from",
            message,
        ), message
        assert len(result["steps"]) == 3


@pytest.mark.parametrize("agreeing", AGREEING, ids=lambda case: case.name)
def test_ranks_that_agree_train_on(results: Results, agreeing: Case) -> None:
    assert len(results[agreeing].losses) == 4
