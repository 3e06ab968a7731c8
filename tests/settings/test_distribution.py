"""TargetDistribution: reading, drawing and writing back."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dynmoe.settings.config import DynMoEConfig
from megatron_dynmoe.settings.distribution import TargetDistribution, parse_target
from megatron_dynmoe.settings.schedule import TargetSchedule

ranges = st.tuples(st.floats(1, 64), st.floats(1, 64)).filter(lambda both: both[0] < both[1])


def test_parse():
    assert parse_target("uniform(1,4)") == TargetDistribution(1, 4)
    assert parse_target(" uniform ( 1.5 , 4 ) ") == TargetDistribution(1.5, 4)
    assert parse_target("0:8,9:2") == TargetSchedule(((0, 8), (9, 2)))
    assert parse_target(2) == TargetSchedule(((0, 2),))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("uniform(4,1)", "is 'uniform(4,1)', which is no range"),
        ("uniform(2,2)", "which is no range"),
        ("uniform(1,inf)", "which is no range"),
        ("uniform(nan,4)", "which is no range"),
        ("normal(1,4)", "is 'normal(1,4)', and there is no distribution 'normal'"),
        ("uniform(1)", "is 'uniform(1)': use"),
        ("uniform(1,2,3)", "is 'uniform(1,2,3)': use"),
        ("uniform(one,4)", "is 'uniform(one,4)': use"),
        ("uniform()", "is 'uniform()': use"),
        ("uniform(1,4", "is 'uniform(1,4': use"),
        ("(1,4)", "is '(1,4)': use"),
        ("0:1,100:uniform(1,4)", "and no schedule can hold a distribution"),
    ],
)
def test_what_is_no_distribution_is_refused(text, reason):
    remedy = r"use uniform\(LOW,HIGH\) with LOW below HIGH, such as uniform\(1,4\)"
    with pytest.raises(
        ValueError, match=f"target_experts_per_token .*{re.escape(reason)}"
    ) as error:
        DynMoEConfig(routing="dtop_p", target_experts_per_token=text)
    assert re.search(remedy, str(error.value))


@given(ranges)
def test_text_reads_back(both):
    drawn = TargetDistribution(*both)
    assert parse_target(str(drawn)) == drawn


@given(ranges, st.integers(0, 2**40), st.integers(0, 10**9))
def test_any_16_steps_from_a_multiple_on_cover_the_range_evenly(both, seed, block):
    low, high = both
    drawn = TargetDistribution(low, high, seed)
    first = 16 * block
    targets = [drawn.at(step) for step in range(first, first + 16)]
    assert all(low <= target <= high for target in targets)
    parts = sorted((target - low) / (high - low) * 16 for target in targets)
    assert all(part - 1e-6 <= value <= part + 1 + 1e-6 for part, value in enumerate(parts))


def test_draws_depend_on_seed_and_step_alone():
    """Also in other processes, whatever was drawn before, and in all versions of Python."""
    drawn = TargetDistribution(1, 4, seed=7)
    steps = [0, 1, 17, 10**6]
    here = [drawn.at(step) for step in steps]
    assert here == pytest.approx([2.4348508, 1.4971119, 1.2800439, 2.4534964], abs=1e-7)
    assert [drawn.at(step) for step in reversed(steps)] == here[::-1]
    assert drawn.at_step(18) == here[2]
    assert TargetDistribution(1, 4, seed=8).at(0) != here[0]
    code = (
        "from megatron_dynmoe.settings.distribution import TargetDistribution as D;"
        f"print([D(1, 4, seed=7).at(step) for step in {steps}])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here)


def test_the_order_within_16_steps_is_drawn_too():
    """Each of the 16 places has each part about as often as the others: no step of a run knows."""
    drawn, blocks = TargetDistribution(0, 16, seed=3), 3200
    seen = [[0] * 16 for _ in range(16)]
    for step in range(16 * blocks):
        seen[step % 16][int(drawn.at(step))] += 1
    expected = blocks / 16
    squares = sum((count - expected) ** 2 / expected for place in seen for count in place)
    assert 150 < squares < 310  # chi-square with 225 degrees of freedom, four standard deviations
