"""On a CPU: the cross entropy of a whole vocabulary, in three passes over its logits, not six.

Upstream's has a pass each for difference, exponential, sum and quotient, as parts of a vocabulary
on several ranks need them. Its exponential is that of Intel's MKL, which takes an AMD processor
three times as long as the one within PyTorch's softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_PROBABILITY = 1e-36  # below it float32 has fewer digits


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log softmax(logits)[target]`` of each token.

    Args:
        logits: [..., V], any floating dtype. In float32 they are overwritten, as by upstream.
        targets: [...] int64. One that is not in the vocabulary, as of padding, has the loss
            ``log sum exp(logits - max(logits))``, as in upstream, where it is masked later.

    Returns:
        [...] float32, differentiable in the logits.
    """
    return _CrossEntropy.apply(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logits_TV, targets_T1 = logits.detach().float().flatten(0, -2), targets.reshape(-1, 1)
        is_outside_T1 = (targets_T1 < 0) | (targets_T1 >= logits.shape[-1])
        targets_T1 = targets_T1.masked_fill(is_outside_T1, 0)
        # The logarithm of a probability that has underflowed is that of its parts.
        below_largest_T1 = logits_TV.gather(-1, targets_T1) - logits_TV.amax(-1, keepdim=True)
        probs_TV = torch.softmax(logits_TV, dim=-1, out=logits_TV)
        chosen_T1 = probs_TV.gather(-1, targets_T1)
        losses_T1 = chosen_T1.log().neg_()
        by_parts_T1 = is_outside_T1 | ~(chosen_T1 > LEAST_PROBABILITY)
        if by_parts_T1.any():
            log_sums_T1 = probs_TV.amax(-1, keepdim=True).log().neg_()
            below_largest_T1.masked_fill_(is_outside_T1, 0)
            losses_T1 = torch.where(by_parts_T1, log_sums_T1 - below_largest_T1, losses_T1)
        ctx.save_for_backward(probs_TV, targets_T1, is_outside_T1)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return losses_T1.view_as(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor, None]:
        probs_TV, targets_T1, is_outside_T1 = ctx.saved_tensors
        d_losses_T1 = d_losses.reshape(-1, 1)
        d_logits_TV = probs_TV.mul_(d_losses_T1)
        from_targets_T1 = d_losses_T1.neg().masked_fill_(is_outside_T1, 0)
        d_logits_TV.scatter_add_(-1, targets_T1, from_targets_T1)
        return d_logits_TV.view(ctx.shape).to(ctx.dtype), None
