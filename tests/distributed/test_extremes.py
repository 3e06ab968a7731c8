"""Training at the edges: one expert or 512, one token, all tokens at one rank, target jumps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_dynmoe.kernels import routing_cpu
from tests.distributed.faults import replaced
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add
from tests.distributed.test_control import (
    K_I,
    K_P,
    STEPS,
    TARGET_2,
    THRESHOLD_0,
    assert_follows_the_law,
)

pytestmark = [pytest.mark.distributed, pytest.mark.megatron, pytest.mark.long]

EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
CAP_8 = "--moe-dynamic-max-experts-per-token 8"
ONE_EXPERT = 5


@contextlib.contextmanager
def all_to_one_expert(recorder: Any) -> Iterator[None]:
    """Every token of every rank and layer uses one expert, which the last rank holds."""

    def select_and_count(probs_TE, threshold, max_experts):
        chosen_TE = torch.zeros_like(probs_TE)
        chosen_TE[:, ONE_EXPERT] = 1
        return chosen_TE, torch.ones(len(probs_TE), dtype=torch.int64)

    with replaced(routing_cpu, "_select_and_count", select_and_count):
        yield


def case(name: str, ranks: int, flags: str, **fields: Any) -> Case:
    return add(Case(f"extreme_{name}", ranks, flags, **fields))


def sized(num_experts: int, flags: str) -> str:
    return f"{TINY} --num-experts {num_experts} {flags}"


def target(number: float) -> str:
    return f"--moe-dynamic-routing dtop_p --moe-dynamic-target-experts-per-token {number}"


ALL_TO_ONE = [
    case(
        f"one_expert_{name}",
        ranks,
        f"{TINY} {DTOP_P} {flags}",
        hooks=(f"{__name__}:all_to_one_expert",),
    )
    for name, ranks, flags in (
        ("ep2", 2, EP2),
        ("ep4", 4, "--expert-model-parallel-size 4"),
        ("allgather", 2, f"{EP2} --moe-token-dispatcher-type allgather"),
        ("pp2_ep2", 4, f"{PP2} {EP2}"),
    )
]
# Case: experts per token of each step, where they are certain.
FEW_AND_MANY = {
    case("e1", 1, sized(1, target(1))): 1,
    case("e1_dp2_top_p", 2, sized(1, "--moe-dynamic-routing top_p")): 1,
    case("e2_ep2", 2, sized(2, f"{target(1.5)} {EP2}")): None,
    case(
        "e512_ep2", 2, sized(512, f"{target(4)} {EP2} --moe-dynamic-max-experts-per-token 8")
    ): None,
    case("k1", 2, f"{TINY} {target(1)} {EP2} --moe-dynamic-max-experts-per-token 1"): 1,
    case("k_all", 2, f"{TINY} --moe-dynamic-routing top_p --moe-dynamic-threshold 1 {EP2}"): 8,
}
SHORT = (
    f"{TINY.replace('--seq-length 32', '--seq-length 1')} {DTOP_P} --micro-batch-size 1 "
    "--global-batch-size {batch}"
)
ONE_TOKEN = case("one_token", 1, SHORT.format(batch=1))
ONE_TOKEN_EACH = case("one_token_each", 2, f"{SHORT.format(batch=2)} {EP2}")
# From the lowest target to the highest and back, each within one step.
TARGETS = [1.0, 1.0, 8.0, 8.0, 1.0, 1.0]
JUMP = case(
    "jump",
    2,
    f"{STEPS} {EP2} --train-iters 6 --moe-dynamic-target-experts-per-token 0:1,1:1,2:8,3:8,4:1",
)
GROWING = (  # Megatron counts in samples if the batch changes: 4 of them twice, then 8 twice
    ("--train-iters 3", "--train-samples 24"),
    ("--train-iters 4", ""),
    ("--lr-warmup-iters 0", "--lr-warmup-samples 0"),
    ("--global-batch-size 8", '--step-batch-size-schedule "0:4 256:8"'),
)
growing = f"{STEPS} {TARGET_2}"
for fixed, changing in GROWING:
    growing = growing.replace(fixed, changing)
RAMP_UP = case("ramp_up", 1, growing)


@pytest.mark.parametrize("trained", ALL_TO_ONE, ids=lambda case: case.name)
def test_all_tokens_may_use_one_expert_of_one_rank(results: Results, trained: Case) -> None:
    result = results[trained]
    assert all(math.isfinite(loss) for loss in result.losses)
    assert result.losses[-1] < result.losses[0]
    counts = [0] * 8
    counts[ONE_EXPERT] = 256
    assert result.assignments == [[counts] * 4] * 3
    thresholds = result.thresholds  # too few experts: it rises
    assert thresholds == sorted(set(thresholds))
    assert "max/mean load: 8.00" in result.log()


@pytest.mark.parametrize("trained", FEW_AND_MANY, ids=lambda case: case.name)
def test_any_number_of_experts(results: Results, trained: Case) -> None:
    result = results[trained]
    assert all(math.isfinite(loss) for loss in result.losses)
    assert result.losses[-1] < result.losses[0] - 0.1
    if FEW_AND_MANY[trained] is not None:
        assert result.experts_per_token == [FEW_AND_MANY[trained]] * 3
    assert all(0 <= threshold <= 1 for threshold in result.thresholds)


@pytest.mark.parametrize("trained", [ONE_TOKEN, ONE_TOKEN_EACH], ids=lambda case: case.name)
def test_one_token(results: Results, trained: Case) -> None:
    result = results[trained]
    assert all(math.isfinite(loss) for loss in result.losses)
    assert [batch["tokens"] for batch in result.finalized] == [[trained.num_ranks] * 4] * 3


def test_the_target_may_jump_from_one_end_to_the_other(results: Results) -> None:
    result = results[JUMP]
    lowest, highest = (0 - THRESHOLD_0) / K_I, (1 - THRESHOLD_0) / K_I
    integral, expected = 0.0, []
    for target, mean in zip(TARGETS, result.experts_per_token, strict=True):
        error = (target - mean) / 8
        integral = min(max(integral + error, lowest), highest)
        expected.append(min(max(THRESHOLD_0 + K_P * error + K_I * integral, 0), 1))
    assert result.thresholds == pytest.approx(expected, abs=1e-6)
    means = result.experts_per_token
    assert min(means) < 1.5 and max(means) > 6  # it gets there


def test_the_law_holds_while_the_batch_grows(results: Results) -> None:
    result = results[RAMP_UP]
    assert [batch["tokens"][0] for batch in result.finalized] == [128, 128, 256, 256]
    assert_follows_the_law(result, [2.0] * 4)
