"""Stops a training at the first router whose logits are NaN or infinite."""

from __future__ import annotations

import torch
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args

from megatron_dynmoe.moe.router import DynamicRouter

REMEDIES = (
    "Nothing of this step is kept. If the last checkpoint stops again at the same step, the "
    "training diverges: lower --lr, warm up longer (--lr-warmup-iters), clip gradients "
    "(--clip-grad) or hold the logits down (--moe-z-loss-coeff), and use bf16 instead of fp16. If "
    "it does not, suspect the hardware of this rank. --no-check-for-nan-in-loss-and-grad trains "
    "on; such a batch then moves no threshold."
)


def check_logits(model: torch.nn.Module) -> None:
    """Stop the run if a router saw NaN or infinite logits; called after each micro-batch's forward.

    The check runs if upstream checks the loss (``--check-for-nan-in-loss-and-grad``, on by
    default), for which the host waits anyway. Here it waits once for all layers of the chunk.
    Upstream's check would find such a batch by its loss on the last stage. It would not say in
    which layer it began, and does not look in the first step.

    Args:
        model: the model chunk that has just run.

    Raises:
        RuntimeError: the message names iteration, rank, the first such layer and its token count.
    """
    args = get_args()
    if not args.check_for_nan_in_loss_and_grad:
        return
    mlps = [layer.mlp for layer in get_attr_wrapped_model(model, "decoder").layers]
    routers = [
        mlp.router for mlp in mlps if isinstance(getattr(mlp, "router", None), DynamicRouter)
    ]
    if not routers:
        return
    counts = torch.stack([router.last_not_finite for router in routers]).tolist()
    bad = {router.layer_number: n for router, n in zip(routers, counts, strict=True) if n}
    if not bad:
        return
    # Upstream counts the iteration after the step; without training it sets no such argument.
    finished = args.curr_iteration if hasattr(args, "curr_iteration") else args.iteration
    when = f"iteration {finished + 1}"
    if not model.training:
        when = f"the evaluation after {when if hasattr(args, 'curr_iteration') else finished}"
    layer, *later = sorted(bad)
    tokens = f"{bad[layer]} {'token' if bad[layer] == 1 else 'tokens'}"
    also = f", and in later layers ({', '.join(map(str, later))})" if later else ""
    raise RuntimeError(
        f"{when}, rank {torch.distributed.get_rank()}: NaN or infinite router logits in layer "
        f"{layer}, for {tokens} of a micro-batch{also}. {REMEDIES}"
    )
