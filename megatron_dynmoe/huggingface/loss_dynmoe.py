"""The loss of the language model for Transformers, with the losses of its routing."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from megatron_dynmoe.huggingface.masking_dynmoe import find_documents


def language_loss(
    logits_BSV: Tensor,
    targets_BS: Tensor,
    aux_loss: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """Mean cross entropy plus the losses of the routing, a float32 scalar.

    Args:
        logits_BSV: [B, S, vocabulary].
        targets_BS: [B, S] int64, what each token has to predict; -100: nothing.
        aux_loss: the losses of the routing, a scalar; or None.
        num_items_in_batch: predicted tokens of all batches whose losses will be added up; then the
            result is this batch's share and not its mean.

    Raises:
        ValueError: there is not one target for each of the logits.
    """
    if targets_BS.shape != logits_BSV.shape[:2]:
        raise ValueError(
            f"the loss has {list(logits_BSV.shape[:2])} logits and {list(targets_BS.shape)} "
            "targets: give labels of the shape of input_ids, and no logits_to_keep with them."
        )
    targets_BS = targets_BS.to(logits_BSV.device)
    summed = F.cross_entropy(
        logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction="sum"
    )
    num_targets = (targets_BS != -100).sum()
    # A batch without targets has the loss 0: the mean of nothing would be NaN, and one such batch
    # would make all weights NaN.
    loss = summed / num_targets.clamp(min=1)
    if aux_loss is not None:
        loss = loss + aux_loss.to(loss.device)
    if num_items_in_batch is not None:
        loss = loss * (num_targets / num_items_in_batch)
    return loss


def next_tokens(labels: Tensor, position_ids: Tensor | None, attention_mask: Any) -> Tensor:
    """The token that each one but a row's last has to predict, [B, S - 1]; -100: none.

    Padding predicts nothing, and no token the first one of the next packed document.
    """
    targets, valid_BS = labels[:, 1:], None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        valid_BS = attention_mask[:, -labels.shape[1] :].bool()
        targets = targets.masked_fill(~valid_BS[:, :-1].to(targets.device), -100)
    documents_BS = None if position_ids is None else find_documents(position_ids, valid_BS)
    if documents_BS is None:
        return targets
    return targets.masked_fill((documents_BS.diff() != 0).to(targets.device), -100)
