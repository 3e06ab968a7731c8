"""The best that this machine does, for a roofline."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks import measure
from benchmarks.places import take_turns

PRODUCT_SECONDS, PROBE_WIDTH = 0.5, 256  # of the product that tells a machine's FLOP/s
# Data sheets, by a part of the name that the driver gives a device.
DATA_SHEETS = {
    "H200": "h200-141g",
    "H100 80GB HBM3": "h100-80g",
    "H100 PCIe": "h100-pcie-80g",
    "A100": "a100-80g",
    "A800": "a800-80g",
}


class Ceilings(NamedTuple):
    """The best that this machine does, in this run, with this number of threads."""

    bytes_per_s: float  # of a copy, read and written
    flops_per_s: float  # of a square matrix product

    def seconds(self, flops: float = 0, num_bytes: float = 0) -> float:
        """The roofline: no less time can so much work take."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


def of_this_machine(dtype: torch.dtype, scale: float = 1.0) -> Ceilings:
    """Measure both, the best of several: products of random matrices, copies larger than caches.

    Args:
        dtype: of the matrices.
        scale: of sizes, for a test.
    """
    width, num_bytes = (8192, 2**32) if measure.on_gpu() else (2048, 2**28)
    width, num_bytes = max(8, int(width * scale)), max(1024, int(num_bytes * scale))
    width = min(width, _width_within(PRODUCT_SECONDS, dtype))
    copy, product = _copy_and_product(dtype, width, num_bytes)
    if measure.on_gpu():
        torch.cuda.empty_cache()  # the memory is the benchmark's again
    return Ceilings(2 * num_bytes / copy, 2 * width**3 / product)


def _width_within(seconds: float, dtype: torch.dtype) -> int:
    """The width of a product that takes about so long, judged by a small one.

    A CPU without instructions for bf16 multiplies it more than a hundred times slower than float32.
    """
    small = torch.ones(PROBE_WIDTH, PROBE_WIDTH, device="cuda" if measure.on_gpu() else "cpu").to(
        dtype
    )
    taken = min(measure.timed(lambda: small @ small)[0] for _ in range(2))
    return max(PROBE_WIDTH, int(PROBE_WIDTH * (seconds / taken) ** (1 / 3)))


def _copy_and_product(dtype: torch.dtype, width: int, num_bytes: int) -> tuple[float, float]:
    """The least seconds that each has taken."""
    device = torch.device("cuda" if measure.on_gpu() else "cpu")
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    providers = {
        "copy": lambda: measure.timed(lambda: target.copy_(source))[0],
        "product": lambda: measure.timed(lambda: torch.mm(left, right, out=product))[0],
    }
    seconds = take_turns(providers, rounds=7)
    return min(seconds["copy"]), min(seconds["product"])


def data_sheet_flops() -> float | None:
    """The vendor's figure for bf16 without sparsity, None where it is not known."""
    from megatron_dynmoe.planning.gpus import GPUS

    if not measure.on_gpu():
        return None
    name = torch.cuda.get_device_name()
    return next((GPUS[gpu].flops for part, gpu in DATA_SHEETS.items() if part in name), None)
