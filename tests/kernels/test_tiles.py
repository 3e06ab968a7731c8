"""Which launches measure how they are cut into tiles."""

import pytest
import torch

pytest.importorskip("triton")
from megatron_dynmoe.kernels import tiles

pytestmark = pytest.mark.triton

FIRST = tiles.Way(64, 32, 16, warps=8, stages=3)


class Kernel:
    """Notes what it is launched with: the tiles, too, if nothing is measured."""

    def __init__(self) -> None:
        self.fn, self.configs, self.given = self, [FIRST.config], {}

    def __getitem__(self, grid):
        return lambda *_, **constants: self.given.update(constants)


def tile_rows(*operands: torch.Tensor | int) -> int | None:
    kernel = Kernel()
    tiles.launch(kernel, lambda tile: (1,), *operands, WIDTH=2)
    return kernel.given.get("TILE_ROWS")


@pytest.fixture
def on_a_device(monkeypatch):
    monkeypatch.setattr(tiles.triton.knobs.runtime, "interpret", False)


def test_tiles_are_measured_if_registers_suffice_for_all(on_a_device):
    values, sums = torch.ones(32, dtype=torch.bfloat16), torch.ones(32)
    assert tile_rows(values, sums, 7) is None
    assert tile_rows(sums, values, 7) == FIRST.rows
    assert tile_rows(values, sums[1:], 7) == FIRST.rows
    assert tile_rows(values, sums[4:], 7) is None


def test_nothing_is_measured_if_runs_have_to_be_deterministic(on_a_device, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert tile_rows(torch.ones(32, dtype=torch.bfloat16)) == FIRST.rows
