"""TargetSchedule: reading, interpolating and writing back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dynmoe.settings.schedule import TargetSchedule


@pytest.mark.parametrize(
    ("text", "points"),
    [
        (2, ((0, 2.0),)),
        (2.5, ((0, 2.5),)),
        ("2", ((0, 2.0),)),
        ("0:8,1000:2", ((0, 8.0), (1000, 2.0))),
        (" 0:8 , 1000:2.25 ", ((0, 8.0), (1000, 2.25))),
        ("100:4", ((100, 4.0),)),
    ],
)
def test_parse(text, points):
    assert TargetSchedule.parse(text).points == points


@pytest.mark.parametrize(
    "text",
    [
        "two", "", "0:", ":2", "0:8,", "0:8;9:2", "0:8:1", "1.5:2", "5:2,5:3", "9:2,5:3", "-1:2",
        "nan", "inf", "0:nan", "1e999", 10**400, True, [2], {0: 8}, {"0": 8}, [[0, 8], [9, 2]],
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(text):
    with pytest.raises(ValueError, match=r"target_experts_per_token is .*0:8,1000:2") as error:
        TargetSchedule.parse(text)
    assert repr(text) in str(error.value)


def test_constant_before_and_after_and_linear_in_between():
    schedule = TargetSchedule.parse("100:8,200:4,400:2")
    at = {0: 8, 100: 8, 101: 7.96, 150: 6, 200: 4, 300: 3, 399: 2.01, 400: 2, 10**9: 2}
    for iteration, target in at.items():
        assert schedule.at(iteration) == pytest.approx(target), iteration


def test_a_number_holds_from_the_first_iteration_on():
    schedule = TargetSchedule.parse(2)
    assert [schedule.at(iteration) for iteration in (0, 1, 10**9)] == [2, 2, 2]


targets = st.floats(1, 512)
schedules = st.dictionaries(st.integers(0, 10**9), targets, min_size=1).map(
    lambda points: TargetSchedule(tuple(sorted(points.items())))
)


@given(schedules)
def test_its_text_reads_back_to_itself(schedule):
    assert TargetSchedule.parse(str(schedule)) == schedule


@given(schedules, st.integers(0, 10**9))
def test_never_leaves_the_range_of_its_points(schedule, iteration):
    values = [target for _, target in schedule.points]
    margin = 1e-9 * max(values)
    assert min(values) - margin <= schedule.at(iteration) <= max(values) + margin
