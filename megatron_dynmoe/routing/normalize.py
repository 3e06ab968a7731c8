"""Dynamic routing normalization (DTop-p)."""

import torch
from torch import Tensor

EPSILON = 1e-6


def normalize(logits_TE: Tensor, theta: Tensor | float) -> Tensor:
    """Bring each token's logits to mean 0 and standard deviation 1, then scale by theta.

    ``theta * (logits - mean) / sqrt(variance + 1e-6)`` over the experts of one token, with the
    population variance. Each token is normalized by itself, so the result is causal and the same
    in training and inference. Constant logits, or a single expert, give zeros, that is, uniform
    probabilities and never NaN.

    Args:
        logits_TE: [T, E], any floating dtype.
        theta: the layer's learnable scale, [1] or a number. A larger theta makes the distribution
            sharper, so that a token uses fewer experts.

    Returns:
        [T, E], dtype of ``logits_TE`` (or of a theta tensor if that is wider).
    """
    centered_TE = logits_TE - logits_TE.mean(dim=-1, keepdim=True)
    variance_T1 = torch.linalg.vecdot(centered_TE, centered_TE).unsqueeze(-1) / logits_TE.shape[-1]
    return theta * (centered_TE * torch.rsqrt(variance_T1 + EPSILON))
