"""The arithmetic that all benchmarks share."""

import csv
import importlib.metadata
import math

import pytest
import torch

from benchmarks import ceilings, measure, profiling


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
    limits = ceilings.Ceilings(bytes_per_s=100.0, flops_per_s=1000.0)
    assert limits.seconds(flops=5000, num_bytes=100) == 5
    assert limits.seconds(flops=500, num_bytes=100) == 1


def test_ceilings_are_measured():
    bytes_per_s, flops_per_s = ceilings.of_this_machine(torch.float32, scale=1 / 16)
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


def read(path):
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def test_rows_with_new_columns_join_the_old_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "identity", lambda *packages: {"date": "today"})
    path = tmp_path / "new" / "rows.csv"
    measure.Rows(path).put({"a": 1, "b": "x, y"})
    rows = measure.Rows(path)
    rows.put({"a": 2, "c": 3})
    rows.put({"d": 4})
    assert [list(row.values()) for row in read(path)] == [
        ["today", "1", "x, y", "", ""],
        ["today", "2", "", "3", ""],
        ["today", "", "", "", "4"],
    ]


def test_a_row_is_on_the_disk_when_it_is_put_and_a_later_version_takes_its_place(tmp_path):
    path = tmp_path / "rows.csv"
    rows = measure.Rows(path, "torch")
    for number, expected in ((1, ["1"]), (2, ["2"])):
        rows.put({"a": number}, name="first")
        assert [row["a"] for row in read(path)] == expected
    rows.put({"a": 3})
    rows.put({"a": 4}, name="first")
    assert [row["a"] for row in read(path)] == ["4", "3"]


def test_who_measures_is_asked_first(tmp_path):
    path = tmp_path / "rows.csv"
    with pytest.raises(importlib.metadata.PackageNotFoundError, match="no-such-package"):
        measure.Rows(path, "no-such-package")


def test_without_a_path_nothing_is_written():
    rows = measure.Rows(None, "torch")
    assert rows.put({"a": 1})["a"] == rows.new[0]["a"] == 1


def test_a_row_says_who_measured():
    identity = measure.identity("torch")
    assert list(identity) == ["date", "commit", "hardware", "versions"]
    assert all(identity.values())
    assert f"torch {torch.__version__.split('+')[0]}" in identity["versions"]
    assert not math.isnan(float(measure.load()))
