"""The arithmetic that all benchmarks share."""

import csv
import itertools
import math
import time

import pytest
import torch

from benchmarks import measure, profiling


def test_turns_rotate_and_only_counted_rounds_count():
    called = []
    clock = itertools.count()

    def provider(name):
        def call():
            called.append(name)
            return next(clock)

        return call

    taken = measure.take_turns({name: provider(name) for name in "abc"}, rounds=4, warm_up=2)
    rounds = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert rounds == ["bca", "cab", "abc", "bca", "cab", "abc"]
    assert taken == {"a": [6, 11, 13, 15], "b": [7, 9, 14, 16], "c": [8, 10, 12, 17]}


def test_turns_stop_when_the_time_is_used_up_but_not_before_the_least_number():
    taken = measure.take_turns({"a": lambda: time.sleep(0.01)}, rounds=500, seconds=0.02)
    assert len(taken["a"]) == measure.MIN_ROUNDS


def test_a_provider_that_runs_out_of_memory_is_named_and_left_out(capsys):
    def fails():
        raise torch.OutOfMemoryError("too large\nsecond line")

    running, failures = measure.without_failing({"good": lambda: None, "bad": fails})
    assert list(running) == ["good"]
    assert failures == {"bad": "too large"}
    assert "bad is left out: too large" in capsys.readouterr().out


def test_spread_and_paired_ratio():
    assert measure.spread([1, 2, 3, 4, 5, 6]) == (3.5, 2, 5)
    ratio = measure.ratio([2, 4, 6, 8], [1, 2, 3, 4])
    assert ratio == (2, 2, 2)
    assert str(ratio) == "2.000 [2.000, 2.000]"


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits, trials = 0, 30
    for _ in range(trials):
        noise = torch.rand(2, 15, generator=generator)
        numerators, denominators = (1.2 + 0.1 * noise[0]).tolist(), (1 + 0.1 * noise[1]).tolist()
        interval = measure.ratio(numerators, denominators, paired=False)
        hits += interval.low <= 1.25 / 1.05 <= interval.high
    assert hits >= 0.85 * trials


def test_the_roofline_is_the_slower_of_bytes_and_flops():
    ceilings = measure.Ceilings(bytes_per_s=100.0, flops_per_s=1000.0)
    assert ceilings.seconds(flops=5000, num_bytes=100) == 5
    assert ceilings.seconds(flops=500, num_bytes=100) == 1


def test_ceilings_are_measured():
    bytes_per_s, flops_per_s = measure.ceilings(torch.float32, scale=1 / 16)
    assert 1e8 < bytes_per_s < 1e13
    assert 1e8 < flops_per_s < 1e15


def test_memory_is_that_of_the_tensors():
    kept = []
    megabyte = 2**20

    def forward():
        kept.append(torch.empty(megabyte, dtype=torch.uint8))
        torch.empty(3 * megabyte, dtype=torch.uint8)  # freed at once

    def backward():
        temporary = torch.empty(4 * megabyte, dtype=torch.uint8)
        kept.clear()
        del temporary

    held, peak = profiling.memory(forward, backward)
    assert held == pytest.approx(megabyte, rel=0.01)
    assert peak == pytest.approx(5 * megabyte, rel=0.01)


def test_rows_with_new_columns_join_the_old_ones(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    measure.append(path, [{"a": 1, "b": "x, y"}])
    measure.append(path, [{"a": 2, "c": 3}, {"d": 4}])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row.values()) for row in rows] == [
        ["1", "x, y", "", ""],
        ["2", "", "3", ""],
        ["", "", "", "4"],
    ]


def test_a_row_says_who_measured():
    identity = measure.identity("torch")
    assert list(identity) == ["date", "commit", "hardware", "versions"]
    assert all(identity.values())
    assert f"torch {torch.__version__.split('+')[0]}" in identity["versions"]
    assert not math.isnan(float(measure.load()))
