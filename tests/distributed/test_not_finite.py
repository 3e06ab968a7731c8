"""Logits, gradients and losses that are NaN, infinite or far too large, within Megatron's loop."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_dynmoe.control.update import GlobalBatchUpdate, routers_of
from megatron_dynmoe.kernels import routing_cpu
from megatron_dynmoe.moe.router import DynamicRouter
from tests.distributed.faults import replaced
from tests.distributed.harness import Case, Results, add
from tests.distributed.test_control import (
    PLAIN,
    SKIPPED,
    STEPS,
    TARGET_2,
    assert_follows_the_law,
    integrals_of,
)

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
NO_DRN = "--moe-dynamic-normalization none"
EVALUATED = "--eval-interval 1 --eval-iters 1"
SAVE = "--save-interval 10 --save {dir}/nan_gradient"
GO_ON = "--no-check-for-nan-in-loss-and-grad"
NUM_TOKENS = 3  # whose logits are spoiled


# --- faults: hooks of the cases, all of them in the second step -----------------------------------


def in_second_step(recorder: Any) -> bool:
    return len(recorder.result["steps"]) == 1


@contextlib.contextmanager
def spoiled(recorder: Any, value: float, layer: int, rank: int, training: bool = True):
    """One logit of three tokens has this value, in one layer of one rank."""
    routing = DynamicRouter.routing

    def spoil(self, logits, padding_mask=None):
        here = (self.layer_number, torch.distributed.get_rank()) == (layer, rank)
        if here and in_second_step(recorder) and self.training is training:
            logits = logits.clone()
            logits.view(-1, self.num_experts)[:NUM_TOKENS, 1] = value
        return routing(self, logits, padding_mask)

    with replaced(DynamicRouter, "routing", spoil):
        try:
            yield
        finally:
            record_state(recorder)


def record_state(recorder: Any) -> None:
    """``state``: thresholds and integrals at the end, by layer."""
    recorder.result["state"] = {
        router.layer_number: (router.threshold.item(), router.integral.item())
        for router in routers_of(recorder.model)
    }


def nan_in_layer_2_of_rank_1(recorder: Any):
    return spoiled(recorder, float("nan"), layer=2, rank=1)


def infinity_in_layer_1(recorder: Any):
    return spoiled(recorder, float("inf"), layer=1, rank=0)


def minus_infinity_in_layer_1(recorder: Any):
    return spoiled(recorder, float("-inf"), layer=1, rank=0)


def nan_in_layer_3_of_rank_1(recorder: Any):
    return spoiled(recorder, float("nan"), layer=3, rank=1)


def nan_in_evaluation(recorder: Any):
    return spoiled(recorder, float("nan"), layer=4, rank=0, training=False)


@contextlib.contextmanager
def counted_as_not_finite(recorder: Any) -> Iterator[None]:
    """The second step counts tokens as if their logits were not finite; all else is in order."""
    count = routing_cpu._tokens_not_finite

    def miscount(logits_TE):
        return torch.tensor(7) if in_second_step(recorder) else count(logits_TE)

    with replaced(routing_cpu, "_tokens_not_finite", miscount):
        yield


@contextlib.contextmanager
def nan_gradient(recorder: Any, times: int = 2) -> Iterator[None]:
    """The second step's gradients hold a NaN, before they are reduced, so many times."""
    update, left = GlobalBatchUpdate.__call__, [None] * times

    def spoil(self, model, *args, **kwargs):
        if in_second_step(recorder) and left:
            left.pop()
            model[0].buffers[0].grad_data[5] = torch.nan
        update(self, model, *args, **kwargs)

    with replaced(GlobalBatchUpdate, "__call__", spoil):
        try:
            yield
        finally:
            record_state(recorder)


def nan_gradient_once(recorder: Any):
    return nan_gradient(recorder, times=1)


@contextlib.contextmanager
def spiky_loss(recorder: Any) -> Iterator[None]:
    """Upstream finds the second step's loss far too large, and runs the step again."""
    from megatron.core.rerun_state_machine import RerunStateMachine

    def is_large(self, result, **kwargs):
        return in_second_step(recorder)

    with replaced(RerunStateMachine, "is_unexpectedly_large", is_large):
        yield


def case(name: str, ranks: int, flags: str, hook: Callable) -> Case:
    hooks = (f"{__name__}:{hook.__name__}",)
    return add(Case(f"not_finite_{name}", ranks, f"{STEPS} {TARGET_2} {flags}", hooks=hooks))


# --- the first bad logits end the run -------------------------------------------------------------

# Case: the rank that reports, when, in which layer.
STOPPED = {
    case("ep2", 2, EP2, nan_in_layer_2_of_rank_1): (1, "iteration 2", 2),
    case("recompute", 2, f"{EP2} {FULL}", nan_in_layer_2_of_rank_1): (1, "iteration 2", 2),
    case("first_stage", 2, PP2, infinity_in_layer_1): (0, "iteration 2", 1),
    case("last_stage", 2, PP2, nan_in_layer_3_of_rank_1): (1, "iteration 2", 3),
    case("minus", 1, NO_DRN, minus_infinity_in_layer_1): (0, "iteration 2", 1),
    case("evaluation", 1, EVALUATED, nan_in_evaluation): (0, "the evaluation after iteration 1", 4),
}


@pytest.mark.parametrize("stopped", STOPPED, ids=lambda case: case.name)
def test_the_run_stops_with_iteration_rank_layer_and_tokens(results: Results, stopped: Case):
    result = results.any(stopped)
    rank, when, layer = STOPPED[stopped]
    message = result.ranks[rank]["error"].strip().splitlines()[-1]
    assert re.match(
        rf"RuntimeError: {when}, rank {rank}: NaN or infinite router logits in layer {layer}, for "
        rf"{NUM_TOKENS} tokens of a micro-batch(, and in later layers \([\d, ]+\))?\. .*--lr.*bf16",
        message,
    ), message
    assert all("error" in other for other in result.ranks)


@pytest.mark.parametrize("stopped", STOPPED, ids=lambda case: case.name)
def test_nothing_of_that_step_is_kept(results: Results, stopped: Case) -> None:
    for rank in results.any(stopped).ranks:
        assert len(rank["steps"]) == 1
        assert_state_is_that_after_the_first_step(rank)


def assert_state_is_that_after_the_first_step(rank: dict[str, Any]) -> None:
    step = rank["steps"][0]
    for layer, state in rank["state"].items():
        assert state == [step["threshold"][layer], step["integral"][layer]]


# --- with the check off, the batch moves nothing --------------------------------------------------

UNCHECKED = case("unchecked", 2, f"{EP2} {GO_ON}", nan_in_layer_2_of_rank_1)
UNCHECKED_RECOMPUTE = case("unchecked_2", 2, f"{EP2} {GO_ON} {FULL}", nan_in_layer_2_of_rank_1)
MISCOUNTED = case("miscounted", 1, GO_ON, counted_as_not_finite)
MISCOUNTED_BY_LAYER = case(
    "miscounted_by_layer", 2, f"{PP2} {GO_ON} --moe-dynamic-scope layer", counted_as_not_finite
)
FP16 = case("fp16", 2, f"{EP2} --fp16 --initial-loss-scale 16", nan_in_layer_2_of_rank_1)


@pytest.mark.parametrize("unchecked", [UNCHECKED, UNCHECKED_RECOMPUTE], ids=lambda case: case.name)
def test_without_the_check_the_threshold_waits(results: Results, unchecked: Case) -> None:
    """The NaN reaches the weights and every later batch, as upstream's flag asks for."""
    result = results[unchecked]
    assert len(result.losses) == 4
    assert_follows_the_law(result, [2.0] * 4, held=(1, 2, 3))
    spoiled_layer = [batch["not_finite"][1] for batch in result.finalized]
    assert spoiled_layer[0] == 0 and spoiled_layer[1] >= NUM_TOKENS
    assert result.finalized[1]["not_finite"][0] == 0  # the layer before
    line = next(line for line in result.log().splitlines() if " iteration        2/" in line)
    assert re.search(r"tokens with NaN or infinite logits: \d+\.\d\d%, from layer 2 \|", line)
    assert "NaN or infinite" not in result.log().split(" iteration        2/")[0]


def test_only_the_batch_itself_is_left_out(results: Results) -> None:
    result = results[MISCOUNTED]
    assert_follows_the_law(result, [2.0] * 4, held=(1,))
    assert result.losses[:2] == results[PLAIN].losses[:2]


def test_no_layer_moves_where_one_was_bad(results: Results) -> None:
    result = results[MISCOUNTED_BY_LAYER]
    thresholds, integrals = result.by_layer("threshold"), result.by_layer("integral")
    assert thresholds[1] == thresholds[0] and integrals[1] == integrals[0]
    measured = result.by_layer("measured")
    assert measured[1] == measured[0] != measured[2]
    assert all(thresholds[2][layer] != thresholds[1][layer] for layer in range(1, 5))


def test_under_loss_scaling_the_step_is_skipped_and_the_run_recovers(results: Results) -> None:
    result = results[FP16]
    assert_follows_the_law(result, [2.0] * 4, skipped=(1,))
    assert [sum(batch["not_finite"]) > 0 for batch in result.finalized] == [
        False,
        True,
        False,
        False,
    ]


# --- gradients and losses -------------------------------------------------------------------------

# Upstream runs the step again. The same: it saves and asks to be started elsewhere. Another result:
# it ends, to be resumed from the last checkpoint.
NAN_GRADIENTS = {
    case("gradient", 2, f"{EP2} {SAVE}", nan_gradient): 16,
    case("gradient_unsaved", 2, EP2, nan_gradient): 16,
    case("gradient_once", 2, f"{EP2} {SAVE}_once", nan_gradient_once): 17,
}
SPIKY = case("spiky", 1, "--check-for-spiky-loss", spiky_loss)


@pytest.mark.parametrize("spoiled", NAN_GRADIENTS, ids=lambda case: case.name)
def test_a_nan_gradient_ends_in_upstreams_check_and_moves_nothing(results: Results, spoiled: Case):
    result = results.any(spoiled)
    for rank in result.ranks:
        assert f"SystemExit: {NAN_GRADIENTS[spoiled]}" in rank["error"]
        assert_state_is_that_after_the_first_step(rank)
    assert len(result.finalized) == 3


def test_a_loss_spike_runs_a_step_twice_and_counts_once(results: Results) -> None:
    result, plain = results[SPIKY], results[PLAIN]
    assert "Spiky loss" in result.log()
    assert len(result.finalized) == 5
    assert result.thresholds == plain.thresholds
    assert integrals_of(result) == integrals_of(plain)


def test_a_skipped_step_is_in_the_metrics(results: Results) -> None:
    """Its tokens were routed and computed; only the update is dropped."""
    result = results[SKIPPED]
    lines = [line for line in result.log().splitlines() if " iteration  " in line]
    found = [float(re.search(r"experts per token: ([\d.]+)", line)[1]) for line in lines]
    assert found == pytest.approx(result.experts_per_token, abs=1e-4)
