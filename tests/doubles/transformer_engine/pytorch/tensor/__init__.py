"""``pytorch/tensor/__init__.py``: the class that Megatron asks parameters for."""

import torch


class QuantizedTensor(torch.Tensor):
    """A tensor in low precision. There is none here."""
