"""Peak arithmetic and memory of GPUs, from their vendor's data sheets."""

from __future__ import annotations

from typing import NamedTuple


class GPU(NamedTuple):
    """One model of GPU.

    Attributes:
        flops: FLOP/s in bf16 on tensor cores, without sparsity.
        memory: bytes; a GB of the data sheet counts as 10^9 bytes. Cards have some 5 % more, which
            remains for CUDA's context, NCCL's buffers and fragmentation.
        capability: CUDA's number of the architecture: 8 is Ampere, 9 Hopper, 10 Blackwell.
    """

    label: str
    flops: float
    memory: float
    capability: tuple[int, int]


GPUS = {
    # NVIDIA A100 Tensor Core GPU data sheet: BF16 312 TFLOPS (624 with sparsity), 40 or 80 GB.
    "a100-40g": GPU("A100 40 GB", 312e12, 40e9, (8, 0)),
    "a100-80g": GPU("A100 80 GB", 312e12, 80e9, (8, 0)),
    # NVIDIA A800 data sheet: the A100's units and memory, with a slower NVLink.
    "a800-80g": GPU("A800 80 GB", 312e12, 80e9, (8, 0)),
    # NVIDIA H100 data sheet, with sparsity: SXM 1,979 TFLOPS, PCIe 1,513; 80 GB each.
    "h100-80g": GPU("H100 SXM 80 GB", 989.5e12, 80e9, (9, 0)),
    "h100-pcie-80g": GPU("H100 PCIe 80 GB", 756.5e12, 80e9, (9, 0)),
    # NVIDIA H200 data sheet: 1,979 TFLOPS with sparsity, 141 GB.
    "h200-141g": GPU("H200 141 GB", 989.5e12, 141e9, (9, 0)),
    # NVIDIA HGX B200 data sheet, eight GPUs: 36 PFLOPS with sparsity; 1,440 GB in a DGX B200.
    "b200-180g": GPU("B200 180 GB", 2250e12, 180e9, (10, 0)),
}
