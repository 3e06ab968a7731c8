"""The least bytes and FLOPs of kernels, against the same by hand."""

import pytest

pytest.importorskip("triton")
from benchmarks import kernel_rooflines
from benchmarks.layer_providers import Workload

pytestmark = pytest.mark.triton

# Two blocks of 128 tokens for each of the two sequences.
SIZES = Workload(hidden=128, ffn=320, experts=16, mean=2, sequence=256, sequences=2)
T, D, F, E = 512, 128, 320, 16
R = 2 * T
BLOCKS, PARTS = 4, 5  # of tokens; of the FFN size, 64 columns each
ENDS, PLACES, PROBS = 4 * E, 8 * R, 4 * R  # int32, int64, float32
SUM = 2 * (R + T) * D + PLACES + 8 * T
EXPECTED = {
    "route_forward": (0, (4 + 4 + 1) * T * E + 8 * T + BLOCKS * (8 * E + 8) + 4 + 4),
    "add_up_parts": (0, BLOCKS * (8 * E + 8) + 2 * (4 + 8) * E + 4 + 8),
    "count_chosen": (0, T * E + 4 * BLOCKS * E + 8 * T),
    "number_rows": (0, T * E + 8 * BLOCKS * E + 8 * T + 3 * PLACES),
    "gate_and_up": (
        4 * R * D * F,
        2 * (T * D + 2 * E * F * D + 3 * R * F) + ENDS + PLACES + PROBS,
    ),
    "multiply_each_row": (2 * R * D * F, 2 * (R * F + E * D * F + R * D) + ENDS),
    "add_rows": (0, SUM),
    "gate_and_up_backward": (
        2 * R * D * F,
        2 * (T * D + E * D * F + 5 * R * F) + ENDS + PLACES + PROBS + 4 * R * PARTS,
    ),
    "second weight": (2 * R * D * F, 2 * (T * D + R * F) + 8 * E * D * F + ENDS + PLACES),
    "first weight": (4 * R * D * F, 2 * (T * D + 2 * R * F) + 16 * E * D * F + ENDS + PLACES),
    "rows": (4 * R * D * F, 2 * (2 * R * F + 2 * E * D * F + R * D) + ENDS),
    "sum of gradients": (0, SUM),
    "route_backward": (0, (4 + 1 + 4 + 4) * T * E + 2 * 4 * E + 4 * BLOCKS + 4 + 4),
    "queries": (0, 2 * 2 * T * D + 4 * 256 * 64),
    "gradient of queries": (0, 2 * 2 * T * D + 4 * 256 * 64),
}


def test_flops_and_bytes_are_those_by_hand():
    found = kernel_rooflines.launches(SIZES)
    by_hand = dict(zip(EXPECTED, found, strict=True))
    assert {name: tuple(launch[1:]) for name, launch in by_hand.items()} == EXPECTED


def test_a_kernel_that_the_table_does_not_name_is_an_error(monkeypatch):
    monkeypatch.setattr(kernel_rooflines, "LAUNCHES", kernel_rooflines.LAUNCHES[:-1])
    with pytest.raises(ValueError, match="LAUNCHES lists"):
        kernel_rooflines.launches(SIZES)


def test_the_larger_of_both_times_counts():
    launch = kernel_rooflines.Launch("any", 312 * 10**12, 10**6)
    assert launch.seconds("a800-80g") == 1
    assert launch._replace(flops=0, num_bytes=2 * 2039 * 10**9).seconds("a800-80g") == 2
