"""Experts per token, as far as settings say."""

import pytest

from megatron_dynmoe.control.calibrate import initial_experts_per_token, initial_threshold
from megatron_dynmoe.jobs.parse import read_args
from megatron_dynmoe.jobs.recipes import recipe_flags
from megatron_dynmoe.moe.rules import TopP
from megatron_dynmoe.planning.experts_per_token import expected_counts
from megatron_dynmoe.settings.config import DynMoEConfig

pytestmark = pytest.mark.megatron


def counts(recipe: str, flags: str = "", **known):
    return expected_counts(read_args([*recipe_flags(recipe), *flags.split()]), **known)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("num_experts", "target"), [(16, 2), (64, 8)])
def test_initial_count_is_the_inverse_of_the_initial_threshold(num_experts, target, normalized):
    threshold = initial_threshold(num_experts, target, 0.8, normalized)
    rule = TopP(DynMoEConfig(routing="top_p"), threshold, num_experts)
    found = initial_experts_per_token(rule, num_experts, 0.8, normalized)
    assert found == pytest.approx(target, abs=0.01)


def test_a_controlled_threshold_starts_at_its_target():
    found = counts("dtop_p_16e")
    assert (found.mean, found.first_steps, found.cap) == (2, 2, None)


def test_a_schedule_ends_at_its_last_target():
    found = counts("dtop_p_16e", "--moe-dynamic-target-experts-per-token 0:8,1000:2")
    assert (found.mean, found.first_steps) == (2, 8)


def test_a_drawn_target_needs_room_for_the_largest():
    """And computes at the mean of all."""
    found = counts("dtop_p_16e", "--moe-dynamic-target-experts-per-token uniform(1,4)")
    assert found.rows_per_token == (4, 4)
    assert (found.mean, found.first_steps, found.computed) == (4, 4, 2.5)
    assert found.source == "the largest target of uniform(1,4), for memory; 2.5 for operations"
    assert counts("dtop_p_16e").computed == 2


def test_a_given_threshold_starts_where_it_leads():
    found = counts("dtop_p_16e", "--moe-dynamic-initial-threshold 0.9")
    assert found.mean == 2 and found.first_steps > 8


def test_a_fixed_threshold_starts_at_about_three_times_its_later_count():
    """Later, the paper's: 1.8 and 2.3 (table 7)."""
    for recipe, later in (("moe_dynamic_p04", 1.8), ("moe_dynamic_p05", 2.3)):
        found = counts(recipe)
        assert 2.8 < found.first_steps / later < 3.5
        assert found.mean == pytest.approx(later, rel=0.12)


def test_known_means_and_caps():
    assert counts("moe_dynamic_p04", experts_per_token=1.8).mean == 1.8
    assert counts("moe_dynamic_p04", "--moe-dynamic-max-experts-per-token 4").first_steps <= 4
    assert counts("moe_top2").first_steps == counts("moe_top2").cap == 2
    assert counts("dense_374m").mean == 0
    with pytest.raises(ValueError, match="--experts-per-token is 17: use 1 to 16"):
        counts("dtop_p_16e", experts_per_token=17)


def test_room_for_the_worst_case_is_taken_from_the_start():
    flags = "--moe-dynamic-max-experts-per-token 4 --moe-dynamic-row-buffer worst_case"
    assert counts("dtop_p_16e").rows_per_token == (2, 2)
    assert counts("dtop_p_16e", flags).rows_per_token == (4, 4)
    assert DynMoEConfig().row_buffer is None


def test_room_for_the_target_has_a_margin_up_to_the_cap():
    flags = "--moe-dynamic-row-buffer target --moe-dynamic-row-buffer-margin 0.25"
    assert counts("dtop_p_16e", flags).rows_per_token == (2.5, 2.5)
    capped = f"{flags} --moe-dynamic-max-experts-per-token 2"
    assert counts("dtop_p_16e", capped).rows_per_token == (2, 2)


def test_gates_may_all_open_before_lambda_is_felt():
    relu = "--moe-dynamic-routing relu"
    found = counts("smoke", relu)
    assert (found.mean, found.first_steps, found.cap) == (2, pytest.approx(8, rel=0.01), None)
    assert found.rows_per_token[1] == found.first_steps
    capped = counts("smoke", f"{relu} --moe-dynamic-max-experts-per-token 4")
    assert (capped.mean, capped.first_steps, capped.cap) == (2, 4, 4)
