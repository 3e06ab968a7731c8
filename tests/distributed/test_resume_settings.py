"""A resumed run with another controller than the one that saved: what it does is defined.

Runs of four steps save after two; others go on from there with one setting changed.
"""

from __future__ import annotations

import pytest

from tests.distributed.harness import TINY, Case, CaseResult, Results, add
from tests.distributed.test_control import GAINS, K_I, K_P, NUM_EXPERTS, TARGET_2, THRESHOLD_0

pytestmark = [pytest.mark.distributed, pytest.mark.megatron, pytest.mark.long]

HALF = 2
RUN = f"{TINY} --train-iters 4 --split 1,0,0 --save-interval {HALF}"
PP2 = "--pipeline-model-parallel-size 2"
BY_LAYER = "--moe-dynamic-scope layer"
DTOP_P = f"{GAINS} {TARGET_2}"
TOP_P = "--moe-dynamic-routing top_p --moe-dynamic-threshold 0.3 --moe-dynamic-normalization"


def saved(name: str, ranks: int, flags: str) -> Case:
    return add(Case(f"settings_{name}", ranks, f"{RUN} {flags} --save {{dir}}/settings_{name}"))


def resumed(name: str, origin: Case, flags: str, ranks: int | None = None) -> Case:
    load = f"--load {{dir}}/{origin.name} --ckpt-step {HALF}"
    flags = f"{RUN} {load} {flags}"
    return add(Case(f"settings_{name}", ranks or origin.num_ranks, flags, after=(origin,)))


GLOBAL = saved("global", 1, DTOP_P)
LAYERS = saved("layers", 2, f"{DTOP_P} {BY_LAYER} {PP2}")
TOP_P_DRN = saved("top_p_drn", 1, f"{TOP_P} drn --moe-dynamic-weights renormalized")
TOP_P_PLAIN = saved("top_p", 1, f"{TOP_P} none")
TOP_K_PP2 = saved("top_k", 2, f"--moe-router-topk 2 {PP2}")

GAINS_2 = resumed(
    "gains", GLOBAL, f"{DTOP_P} --moe-dynamic-integral-gain 1 --moe-dynamic-proportional-gain 0"
)
TO_LAYERS = resumed("to_layers", GLOBAL, f"{DTOP_P} {BY_LAYER}")
TO_GLOBAL = resumed("to_global", LAYERS, f"{DTOP_P} {PP2}")
TO_GLOBAL_ONE_RANK = resumed("to_global_one_rank", LAYERS, DTOP_P, ranks=1)
BOUNDED = resumed(
    "bounded", GLOBAL, f"{DTOP_P.replace('0.45', '0.1')} --moe-dynamic-max-threshold 0.2"
)
TO_DTOP_P = resumed("to_dtop_p", TOP_P_DRN, DTOP_P)
TO_TOP_P = resumed("to_top_p", GLOBAL, f"{TOP_P} drn")
WITHOUT_THETA = resumed("without_theta", TOP_P_PLAIN, DTOP_P)
LAX = "--dist-ckpt-strictness log_all --no-load-optim"
WITHOUT_THETA_LAX = resumed("without_theta_lax", TOP_P_PLAIN, f"{DTOP_P} {LAX}")
WITHOUT_STATE = resumed("without_state", TOP_K_PP2, f"{TOP_P} none {PP2}")
THETA_LEFT_OUT = resumed("theta_left_out", GLOBAL, f"{TOP_P} none")


def assert_goes_on(
    result: CaseResult,
    integral: float,
    gains: tuple[float, float] = (K_P, K_I),
    initial: float = THRESHOLD_0,
    highest: float = 1,
) -> None:
    """Both steps follow the law by hand, from this sum of errors."""
    proportional, integral_gain = gains
    bounds = (0 - initial) / integral_gain, (highest - initial) / integral_gain
    thresholds = []
    for mean in result.experts_per_token:
        error = (2 - mean) / NUM_EXPERTS
        integral = min(max(integral + error, bounds[0]), bounds[1])
        threshold = initial + proportional * error + integral_gain * integral
        thresholds.append(min(max(threshold, 0), highest))
    assert result.thresholds == pytest.approx(thresholds, abs=1e-6)


def saved_integrals(result: CaseResult) -> list[float]:
    """After the step with which the others begin, by layer."""
    return list(result.by_layer("integral")[HALF - 1].values())


def assert_routes_one_batch_as(resumed: CaseResult, origin: CaseResult) -> None:
    """The first batch is routed by the state that was saved."""
    assert resumed.assignments[0] == origin.assignments[HALF]
    assert resumed.losses[0] == origin.losses[HALF]


def test_other_gains_scale_what_was_summed(results: Results) -> None:
    origin, resumed = results[GLOBAL], results[GAINS_2]
    assert_routes_one_batch_as(resumed, origin)
    assert_goes_on(resumed, saved_integrals(origin)[0], gains=(0, 1))


def test_each_layer_starts_from_the_common_sum(results: Results) -> None:
    origin, resumed = results[GLOBAL], results[TO_LAYERS]
    assert_routes_one_batch_as(resumed, origin)
    tokens = resumed.finalized[0]["tokens"][0]
    errors = [(2 - sum(counts) / tokens) / NUM_EXPERTS for counts in resumed.assignments[0]]
    wanted = [saved_integrals(origin)[0] + error for error in errors]
    assert list(resumed.by_layer("integral")[0].values()) == pytest.approx(wanted, abs=1e-6)
    thresholds = [THRESHOLD_0 + K_P * e + K_I * s for e, s in zip(errors, wanted, strict=True)]
    assert list(resumed.by_layer("threshold")[0].values()) == pytest.approx(thresholds, abs=1e-6)


def test_the_common_sum_starts_from_the_mean_of_the_layers(results: Results) -> None:
    origin, resumed = results[LAYERS], results[TO_GLOBAL]
    assert len(set(saved_integrals(origin))) == 4
    assert resumed.assignments[0] == origin.assignments[HALF]
    assert_goes_on(resumed, sum(saved_integrals(origin)) / 4)
    assert results[TO_GLOBAL_ONE_RANK].thresholds == resumed.thresholds


def test_a_threshold_out_of_new_bounds_routes_one_batch(results: Results) -> None:
    origin, resumed = results[GLOBAL], results[BOUNDED]
    assert origin.thresholds[HALF - 1] > 0.2
    assert_routes_one_batch_as(resumed, origin)
    assert_goes_on(resumed, saved_integrals(origin)[0], initial=0.1, highest=0.2)


def test_a_fixed_threshold_is_where_control_begins(results: Results) -> None:
    origin, resumed = results[TOP_P_DRN], results[TO_DTOP_P]
    assert_routes_one_batch_as(resumed, origin)
    assert_goes_on(resumed, integral=0)


@pytest.mark.parametrize("case", [TO_TOP_P, THETA_LEFT_OUT], ids=lambda case: case.name)
def test_a_fixed_threshold_ends_control_and_keeps_the_sum(results: Results, case: Case) -> None:
    origin, resumed = results[GLOBAL], results[case]
    assert resumed.thresholds == [pytest.approx(0.3)] * 2
    assert "is replaced by --moe-dynamic-threshold 0.3" in resumed.log()
    for integrals in resumed.by_layer("integral"):
        assert list(integrals.values()) == saved_integrals(origin)
    thetas = origin.by_layer("theta")[HALF - 1], resumed.by_layer("theta")[0]
    assert (set(thetas[1].values()) == {1.0}) == (case is THETA_LEFT_OUT)


def test_theta_that_is_missing_stops_the_load_or_starts_afresh(results: Results) -> None:
    assert "routers without theta_offset" in results.any(WITHOUT_THETA).error
    resumed = results[WITHOUT_THETA_LAX]
    assert_goes_on(resumed, integral=0)
    assert all(
        theta == pytest.approx(1, abs=0.05) for theta in resumed.by_layer("theta")[0].values()
    )


def test_state_that_a_stock_run_did_not_keep_stops_the_load_on_all_ranks(results: Results) -> None:
    errors = [rank["error"] for rank in results.any(WITHOUT_STATE).ranks]
    assert len(errors) == 2
    assert all("was not trained with dynamic routing" in error for error in errors)
