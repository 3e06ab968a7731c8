"""Where tensors have to be; the original asks ``is_cuda`` in each of its files."""

import torch


def stands_for_cuda(tensor: torch.Tensor) -> bool:
    """Whether a tensor is where ``torch.cuda`` says that the current device is.

    That is the CPU under a layer that lets the CPU stand in for CUDA.
    """
    device = torch.cuda.current_device()
    kind = device.type if isinstance(device, torch.device) else "cuda"
    return tensor.device.type == kind


def check_on_device(**tensors: torch.Tensor | None) -> None:
    """``pytorch/permutation.py``, moe_permute_mask_map_forward: all operands are on the GPU."""
    for name, tensor in tensors.items():
        if tensor is not None and not stands_for_cuda(tensor):
            raise ValueError(f"{name} must be a CUDA tensor, but got tensor on {tensor.device}.")
