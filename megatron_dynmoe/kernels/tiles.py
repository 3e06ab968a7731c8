"""How the GEMMs of Triton are cut into tiles: a few ways, of which a device measures the fastest.

A GPU's memory, caches and tensor cores decide which way is the fastest, so it is not written down
here. The first launch for sizes and a number of rows (to a power of two) tries all of them, and
Triton keeps the result with its compiled kernels, on the disk. Other tiles add up in another order,
so that ``--deterministic-mode``, which asks for the same bits on every machine of a kind, takes the
first way without measuring. So does whatever has too few registers for wider tiles.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# How many programs there are, by a way's constants.
Grid = Callable[[dict[str, Any]], tuple[int, ...]]


class Way(NamedTuple):
    """A tile, and the program that computes it.

    Attributes:
        inner: how much of the inner size a step of the loop takes.
        stages: how many steps are loaded at a time.
        since: the first GPUs whose registers suffice, as 10 x their compute capability.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    since: int = 80

    @property
    def config(self) -> triton.Config:
        """As Triton has it."""
        tile = {"TILE_ROWS": self.rows, "TILE_COLUMNS": self.columns, "TILE_INNER": self.inner}
        return triton.Config(tile, num_warps=self.warps, num_stages=self.stages)


def tiled(*key: str, ways: Sequence[Way], changes: str | None = None) -> Callable[[Any], Any]:
    """Give a kernel its tiles, as the constants TILE_ROWS, TILE_COLUMNS and TILE_INNER.

    Args:
        key: names of the arguments that decide which way is the fastest, beside ``situation``,
            which the kernel takes and does not read.
        ways: to choose from; the first one is for every GPU and dtype.
        changes: a tensor that a launch adds to, or of which it writes a part. It is put back after
            every trial, and that is timed with all ways alike.
    """

    def prune(configs: list[triton.Config], *_: Any, **__: Any) -> list[triton.Config]:
        major, minor = torch.cuda.get_device_capability()
        found = zip(configs, ways, strict=True)
        return [config for config, way in found if way.since <= 10 * major + minor]

    return triton.autotune(
        [way.config for way in ways],
        [*key, "situation"],
        restore_value=changes and [changes],
        prune_configs_by={"early_config_prune": prune},
        cache_results=True,
    )


def launch(kernel: Any, grid: Grid, *args: Any, **constants: Any) -> None:
    """Launch a kernel of :func:`tiled`; its first argument has the dtype that it multiplies."""
    if measures() and _all_ways_fit([arg for arg in args if isinstance(arg, Tensor)]):
        kernel[grid](*args, **constants)
    else:
        kernel.fn[grid](*args, **constants, **kernel.configs[0].all_kwargs())


def _all_ways_fit(operands: Sequence[Tensor]) -> bool:
    """Whether registers suffice for every way.

    For most ways but the first they do not in float32, and for some not on Blackwell if an operand,
    such as a gradient in Megatron's buffer, begins at an address that is no multiple of 16.
    """
    aligned = not any(operand.data_ptr() % 16 for operand in operands)
    return operands[0].itemsize == 2 and aligned


def situation(num_rows: int) -> int:
    """A number for what Triton's own key leaves out: the device's name and the number of rows.

    It is a multiple of 16, as Triton compiles other code for other numbers.
    """
    return 16 * (zlib.crc32(f"{_device()} {triton.next_power_of_2(num_rows)}".encode()) >> 5)


@functools.cache
def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def measures() -> bool:
    """Whether ways are tried; Triton's interpreter has no time to measure."""
    is_interpreted = triton.knobs.runtime.interpret
    return not (is_interpreted or torch.are_deterministic_algorithms_enabled())
