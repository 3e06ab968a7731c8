"""The controller within Megatron's loop: what is measured, when it counts, and what is logged."""

import re

import pytest

from tests.distributed.harness import TINY, Case, CaseResult, Results, add
from tests.distributed.selection import matrix

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

# Gains and start by hand, so that the expected trajectory owes nothing to the package.
THRESHOLD_0, K_P, K_I, NUM_EXPERTS = 0.45, 0.3, 0.5, 8
GAINS = (
    f"--moe-dynamic-routing dtop_p --moe-dynamic-initial-threshold {THRESHOLD_0} "
    f"--moe-dynamic-proportional-gain {K_P} --moe-dynamic-integral-gain {K_I}"
)
STEPS = f"{TINY} {GAINS} --train-iters 4"
TARGET_2 = "--moe-dynamic-target-experts-per-token 2"
PP2_EP2 = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
FAULTS = "tests.distributed.faults"

PLAIN = add(Case("plain", 1, f"{STEPS} {TARGET_2} --tensorboard-dir {{dir}}/tensorboard"))
BF16 = add(Case("bf16_pp2_ep2", 4, f"{STEPS} {TARGET_2} {PP2_EP2} --bf16"))
BY_LAYER = add(
    Case(
        "by_layer_pp2",
        2,
        f"{STEPS} {TARGET_2} --pipeline-model-parallel-size 2 --moe-dynamic-scope layer",
    )
)
SCHEDULE = add(
    Case("schedule", 1, f"{STEPS} --moe-dynamic-target-experts-per-token 0:1.5,2:2.5,3:4")
)
SKIPPED = add(
    Case("skipped", 1, f"{STEPS} {TARGET_2}", hooks=(f"{FAULTS}:second_step_is_skipped",))
)
SKIPPED_PP2_EP2 = add(
    Case(
        "skipped_pp2_ep2",
        4,
        f"{STEPS} {TARGET_2} {PP2_EP2}",
        hooks=(f"{FAULTS}:second_step_is_skipped",),
    )
)
# Gradients scaled by 2 ** 40 overflow: Megatron skips steps until the scale has come down.
FP16 = add(
    Case(
        "fp16",
        2,
        f"{STEPS} {TARGET_2} --expert-model-parallel-size 2 --fp16 "
        f"--initial-loss-scale {2**40} --hysteresis 1",
    )
)
# Upstream's rerun machine runs every step twice.
RERUN = add(
    Case(
        "rerun",
        2,
        f"{STEPS} {TARGET_2}",
        hooks=(f"{FAULTS}:every_step_runs_twice", f"{FAULTS}:first_run_of_a_step_is_wrong"),
    )
)
EVALUATED = add(
    Case(
        "evaluated",
        1,
        f"{STEPS} {TARGET_2} --eval-interval 1 --eval-iters 2 "
        "--moe-dynamic-inference-max-experts-per-token 1",
    )
)
ITERATION_LEFT_OUT = add(Case("left_out", 1, f"{STEPS} {TARGET_2} --iterations-to-skip 2"))
COUNTED = add(
    Case(
        "counted",
        4,
        f"{STEPS} {TARGET_2} {PP2_EP2} --log-interval 10",
        hooks=(f"{FAULTS}:count_syncs_and_reductions",),
    )
)


def expected(
    measured: list[float], targets: list[float], skipped: tuple[int, ...] = ()
) -> tuple[list[float], list[float]]:
    """Thresholds and integrals after each step, by hand from the experts per token of each."""
    thresholds, integrals = [], []
    threshold, integral = THRESHOLD_0, 0.0
    for step, (mean, target) in enumerate(zip(measured, targets, strict=True)):
        if step not in skipped:
            error = (target - mean) / NUM_EXPERTS
            integral += error
            threshold = THRESHOLD_0 + K_P * error + K_I * integral
        thresholds.append(threshold)
        integrals.append(integral)
    return thresholds, integrals


def integrals_of(result: CaseResult) -> list[float]:
    by_step = [set(step.values()) for step in result.by_layer("integral")]
    assert all(len(values) == 1 for values in by_step), by_step
    return [value for (value,) in by_step]


def assert_follows_the_law(
    result: CaseResult,
    targets: list[float],
    skipped: tuple[int, ...] = (),
    held: tuple[int, ...] = (),
) -> None:
    """``held``: steps that were taken and left the controller as it was."""
    thresholds, integrals = expected(result.experts_per_token, targets, skipped + held)
    assert result.thresholds == pytest.approx(thresholds, abs=1e-6)
    assert integrals_of(result) == pytest.approx(integrals, abs=1e-6)
    assert [step["skipped"] for step in result.ranks[-1]["steps"]] == [
        step in skipped for step in range(len(targets))
    ]
    assert all(not any(counted.values()) for counted in result.by_layer("counted"))


@pytest.mark.parametrize("case", matrix([PLAIN, BF16], ("plain",)))
def test_the_threshold_follows_the_law(results: Results, case: Case) -> None:
    result = results[case]
    assert_follows_the_law(result, [2.0] * 4)
    in_force = [sum(batch["knobs"]) / sum(batch["routers"]) for batch in result.finalized]
    assert in_force == pytest.approx([THRESHOLD_0, *result.thresholds[:-1]])
    assert result.losses[-1] < result.losses[0] - 0.1


def test_each_layer_may_follow_the_law_by_itself(results: Results) -> None:
    result = results[BY_LAYER]
    for layer in range(4):
        measured = [
            sum(batch["assignments"][layer]) / batch["tokens"][layer] for batch in result.finalized
        ]
        thresholds, integrals = expected(measured, [2.0] * 4)
        for name, values in (
            ("threshold", thresholds),
            ("integral", integrals),
            ("measured", measured),
        ):
            found = [step[layer + 1] for step in result.by_layer(name)]
            assert found == pytest.approx(values, abs=1e-6)
    assert len(set(result.by_layer("threshold")[-1].values())) == 4


def test_the_target_follows_its_schedule(results: Results) -> None:
    assert_follows_the_law(results[SCHEDULE], [1.5, 2.0, 2.5, 4.0])


@pytest.mark.parametrize("case", [SKIPPED, SKIPPED_PP2_EP2], ids=lambda case: case.name)
def test_a_skipped_step_counts_for_nothing(results: Results, case: Case) -> None:
    result = results[case]
    assert_follows_the_law(result, [2.0] * 4, skipped=(1,))
    assert result.thresholds[1] == result.thresholds[0]
    assert result.thresholds[2] != result.thresholds[1]
    measured = result.by_layer("measured")
    assert measured[1] == measured[0] != measured[2]


def test_overflow_in_fp16_skips_steps(results: Results) -> None:
    result = results[FP16]
    flags = [step["skipped"] for step in result.ranks[0]["steps"]]
    skipped = tuple(step for step, flag in enumerate(flags) if flag)
    assert skipped
    assert_follows_the_law(result, [2.0] * len(flags), skipped=skipped)


def test_of_a_step_that_runs_twice_the_second_run_counts(results: Results) -> None:
    result, plain = results[RERUN], results[PLAIN]
    assert len(result.finalized) == 2 * len(plain.finalized)
    assert result.finalized[1::2][0]["assignments"] == plain.finalized[0]["assignments"]
    assert result.experts_per_token[0] > 8 > result.experts_per_token[1]
    assert result.thresholds == pytest.approx(plain.thresholds, abs=1e-7)
    assert integrals_of(result) == pytest.approx(integrals_of(plain), abs=1e-7)


def test_evaluation_leaves_the_controller_alone(results: Results) -> None:
    result, plain = results[EVALUATED], results[PLAIN]
    assert result.losses == plain.losses
    assert result.finalized == plain.finalized
    assert result.thresholds == plain.thresholds
    reported = re.findall(r"validation experts per token: ([\d.]+)", result.log())
    # After each step, at the end, and on the test set; its own mean: the cap of evaluation is 1.
    assert reported == ["1.0000"] * 6


def test_an_iteration_left_out_does_not_count(results: Results) -> None:
    result = results[ITERATION_LEFT_OUT]
    assert len(result.finalized) == 3
    assert_follows_the_law(result, [2.0] * 3)
    assert result.assignments[0] == results[PLAIN].assignments[0]


def test_the_update_costs_one_reduction_and_no_sync(results: Results) -> None:
    for rank in results[COUNTED].ranks:
        assert rank["update"] == [[1, 0]] * 4
        assert rank["routing_syncs"] == 0


def test_the_console_line(results: Results) -> None:
    result = results[PLAIN]
    pattern = (
        r"experts per token: ([\d.]+) \(target 2\) \| threshold: ([\d.]+) .*"
        r"TFLOP/s from measured experts: ([\d.e+-]+)"
    )
    lines = [line for line in result.log().splitlines() if " iteration  " in line]
    found = [re.search(pattern, line) for line in lines]
    assert len(found) == 4 and all(found), "\n".join(lines)
    means, thresholds, flops = zip(*(match.groups() for match in found if match), strict=True)
    assert [float(mean) for mean in means] == pytest.approx(result.experts_per_token, abs=1e-4)
    in_force = [THRESHOLD_0, *result.thresholds[:-1]]
    assert [float(threshold) for threshold in thresholds] == pytest.approx(in_force, abs=1e-5)
    assert all(float(rate) > 0 for rate in flops)


def test_tensorboard(results: Results) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = results[PLAIN]
    events = EventAccumulator(str(result.directory / "tensorboard"))
    events.Reload()

    def values(name: str) -> list[float]:
        return [event.value for event in events.Scalars(name)]

    assert values("dynmoe/experts_per_token") == pytest.approx(result.experts_per_token)
    in_force = [THRESHOLD_0, *result.thresholds[:-1]]
    assert values("dynmoe/threshold") == pytest.approx(in_force)
    for layer in range(4):
        assert values(f"dynmoe_layers/experts_per_token_layer_{layer + 1}") == pytest.approx(
            [sum(step[layer]) / 256 for step in result.assignments]
        )
        assert len(values(f"dynmoe_layers/theta_layer_{layer + 1}")) == 4
    for name in ("balance_loss", "dynamic_loss", "max_over_mean_load", "tokens_per_second"):
        assert len(values(f"dynmoe/{name}")) == 4
