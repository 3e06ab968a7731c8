"""A double of Apex's extension: ``csrc/megatron/fused_weight_gradient_dense*.cpp``.

Its presence decides whether ``--gradient-accumulation-fusion``, Megatron's default, can be on.
"""

import torch
from torch import Tensor


def wgrad_gemm_accum_fp32(inp: Tensor, grad: Tensor, main_grad: Tensor) -> None:
    """Add the gradient of a weight, ``grad.T @ inp``, to a float32 tensor."""
    assert inp.dtype == grad.dtype and main_grad.dtype == torch.float32
    assert inp.dim() == grad.dim() == 2 and inp.is_contiguous() and grad.is_contiguous()
    main_grad.add_(grad.t() @ inp)
