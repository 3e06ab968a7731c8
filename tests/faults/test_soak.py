"""The judgment of the soak, on samples of a run that was never made."""

import dataclasses
import random

import pytest

from megatron_dynmoe.runs.events import Series
from tests.faults.soak import TARGET, Sample, in_windows, judge, table

MINUTES = 20


def samples(**grows: float) -> list[Sample]:
    """One look a second, with noise and peaks; what is named grows by so much a minute."""
    generator = random.Random(0)
    found, cpu = [], 0.0
    for second in range(10, 60 * MINUTES):
        minutes, is_saving = second / 60, second % 50 < 2
        cpu += 0.95 * (1 + 0.05 * generator.random())
        sample = Sample(
            seconds=second,
            step=5 * (second // 2),
            memory=900 + 200 * is_saving + 3 * generator.random(),
            files=20 + is_saving,
            threads=5,
            children=int(second % 30 < 4),
            cpu_seconds=cpu,
            yardstick=0.01,
        )
        for name, rate in grows.items():
            value = getattr(sample, name) + rate * minutes
            sample = dataclasses.replace(sample, **{name: type(getattr(sample, name))(value)})
        found.append(sample)
    return found


def experts(value: float = TARGET) -> Series:
    steps = list(range(5, 3005, 5))
    return Series(steps, [value + 0.02 * (-1) ** index for index in range(len(steps))], steps)


def test_a_flat_run_passes() -> None:
    windows = in_windows(samples(), experts())
    assert judge(windows) == []
    assert table(windows).count("\n") == len(windows)


@pytest.mark.parametrize(
    ("grows", "said"),
    [
        ({"memory": 1.5}, "memory grows by 1"),
        ({"files": 0.3}, "files grow from 2"),
        ({"threads": 0.3}, "threads grow from "),
        ({"children": 0.3}, "children grow from "),
    ],
)
def test_what_grows_is_named(grows: dict[str, float], said: str) -> None:
    (problem,) = judge(in_windows(samples(**grows), experts()))
    assert said in problem


def test_a_step_that_slows_down_is_named() -> None:
    slower = [
        dataclasses.replace(sample, cpu_seconds=sample.cpu_seconds * (1 + sample.seconds / 3000))
        for sample in samples()
    ]
    (problem,) = judge(in_windows(slower, experts()))
    assert "the processor's time for a step grows by 2" in problem


def test_a_machine_that_slows_down_is_not_the_step() -> None:
    slower = [
        dataclasses.replace(
            sample,
            cpu_seconds=sample.cpu_seconds * (1 + sample.seconds / 3000),
            yardstick=sample.yardstick * (1 + 2 * sample.seconds / 3000),
        )
        for sample in samples()
    ]
    assert judge(in_windows(slower, experts())) == []


def test_what_grows_in_the_warm_up_only_is_flat() -> None:
    early = [
        dataclasses.replace(sample, memory=sample.memory - max(0, 300 - sample.step))
        for sample in samples()
    ]
    assert judge(in_windows(early, experts())) == []


def test_too_few_steps_are_not_judged() -> None:
    few = [dataclasses.replace(sample, step=sample.step // 8) for sample in samples()]
    with pytest.raises(SystemExit, match="374 steps are too few to judge"):
        in_windows(few, experts())


def test_a_count_that_is_not_held_is_named() -> None:
    problems = judge(in_windows(samples(), experts(1.06 * TARGET)))
    assert len(problems) == 6 and "2.120 experts per token up to minute" in problems[0]
