"""The rows of the busiest expert-parallel rank: counted, reported and held at the target."""

import re

import pytest

from tests.distributed.harness import TINY, Case, CaseResult, Results, add
from tests.distributed.selection import matrix

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

NUM_EXPERTS, NUM_LAYERS, STEPS = 8, 4, 4
TARGET = 3.0
# Gains and start by hand, so that the expected trajectory owes nothing to the package.
THRESHOLD_0, K_P, K_I = 0.45, 0.3, 0.5
HELD = (
    f"{TINY} --train-iters {STEPS} --moe-dynamic-routing dtop_p "
    f"--moe-dynamic-target-experts-per-token {TARGET} "
    f"--moe-dynamic-initial-threshold {THRESHOLD_0} --moe-dynamic-proportional-gain {K_P} "
    f"--moe-dynamic-integral-gain {K_I} --moe-dynamic-controlled-quantity busiest_rank "
    "--moe-token-dispatcher-type alltoall"
)
HOOKS = ("tests.distributed.faults:tokens_of_each_expert",)


def case(name: str, num_ranks: int, ep: int, more: str = "") -> Case:
    flags = f"{HELD} --expert-model-parallel-size {ep} {more}"
    return add(Case(f"busiest_{name}", num_ranks, flags, hooks=HOOKS))


CASES = {
    # Two groups of two ranks, whose busiest ranks need not be the same.
    "ep2_dp2": (case("ep2_dp2", 4, 2), [(0, 1), (2, 3)]),
    "ep4": (case("ep4", 4, 4), [(0, 1, 2, 3)]),
    "ep2_pp2": (
        case("ep2_pp2", 4, 2, "--pipeline-model-parallel-size 2"),
        [(0, 1), (2, 3)],
    ),
    "recomputed": (
        case("recomputed", 2, 2, "--recompute-granularity full --recompute-method uniform "
             "--recompute-num-layers 1"),
        [(0, 1)],
    ),
}  # fmt: skip
EP4 = CASES["ep4"]
ONE_RANK = add(Case("busiest_one_rank", 1, HELD))
PLAIN = add(Case("busiest_plain", 1, HELD.replace("busiest_rank", "experts")))
ALLGATHER = add(
    Case(
        "busiest_allgather",
        2,
        f"{HELD} --expert-model-parallel-size 2".replace("alltoall", "allgather"),
    )
)


def rows_by_hand(result: CaseResult, groups: list[tuple[int, ...]]) -> list[tuple[float, float]]:
    """Rows of the busiest and of the mean rank, summed over each step's dispatches, by hand."""
    found = [[0.0, 0.0] for _ in range(STEPS)]
    for group in groups:
        sent = [result.ranks[rank]["sent"] for rank in group]
        per_step = len(sent[0]) // STEPS
        for number, dispatch in enumerate(zip(*sent, strict=True)):
            assert len({layer for layer, _ in dispatch}) == 1, "ranks dispatch in another order"
            tokens_E = [sum(counts) for counts in zip(*(n for _, n in dispatch), strict=True)]
            share = NUM_EXPERTS // len(group)
            rows = [sum(tokens_E[first : first + share]) for first in range(0, NUM_EXPERTS, share)]
            found[number // per_step][0] += max(rows) * len(group)
            found[number // per_step][1] += sum(rows)
    return [(busiest, total) for busiest, total in found]


@pytest.mark.parametrize("name", matrix(CASES, ("ep4", "recomputed")))
def test_the_busiest_rank_of_each_dispatch_is_counted(results: Results, name: str) -> None:
    case, groups = CASES[name]
    result = results[case]
    expected = rows_by_hand(result, groups)
    for batch, (busiest, total) in zip(result.finalized, expected, strict=True):
        assert sum(batch["busiest_rows"]) == busiest
        assert sum(batch["rows"]) == total == sum(map(sum, batch["assignments"]))
        assert busiest > total, "the ranks are equally busy, so this case shows nothing"


@pytest.mark.parametrize("name", matrix(CASES, ("ep4", "recomputed")))
def test_the_target_is_that_of_the_busiest_rank(results: Results, name: str) -> None:
    """The law by hand, on the mean times the rows of the busiest rank over the mean rank's."""
    case, groups = CASES[name]
    result = results[case]
    integral, thresholds = 0.0, []
    for mean, (busiest, total) in zip(
        result.experts_per_token, rows_by_hand(result, groups), strict=True
    ):
        error = (TARGET - mean * busiest / total) / NUM_EXPERTS
        integral += error
        thresholds.append(THRESHOLD_0 + K_P * error + K_I * integral)
    assert result.thresholds == pytest.approx(thresholds, abs=1e-6)


def test_with_one_rank_it_is_the_mean(results: Results) -> None:
    one, plain = results[ONE_RANK], results[PLAIN]
    assert one.losses == plain.losses and one.thresholds == plain.thresholds
    assert all(sum(batch["dispatches"]) == 0 for batch in one.finalized)
    assert "busiest rank" not in one.log()


def test_the_console_says_how_long_a_step_waits(results: Results) -> None:
    case, groups = EP4
    result = results[case]
    said = re.findall(r"busiest rank / mean: ([\d.]+) \| waiting for it: ([\d.]+)%", result.log())
    ratios = [busiest / total for busiest, total in rows_by_hand(result, groups)]
    assert [float(ratio) for ratio, _ in said] == pytest.approx(ratios, abs=6e-4)
    # The experts do a part of the step's work, so less is lost than they would lose alone.
    assert all(
        0 < float(lost) < 100 * (1 - 1 / ratio)
        for (_, lost), ratio in zip(said, ratios, strict=True)
    )


def test_a_dispatcher_that_does_not_count_rows_is_refused(results: Results) -> None:
    result = results.any(ALLGATHER)
    assert result.error is not None
    assert "--moe-dynamic-controlled-quantity is 'busiest_rank'" in result.error
    assert "use alltoall" in result.error
