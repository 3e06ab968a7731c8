"""Documents of one row kept apart: attention runs document by document, and no mask is built.

A row of training data holds several documents, one after another. With ``--reset-attention-mask`` a
token attends to its own document only. Upstream's data loader makes a mask of it, [S, S] for each
row, and attention computes all scores and hides most of them. Here attention gets the lengths of
the documents and computes nothing else than their own scores: each document is a causal attention
of its own, with the same kernels as a whole row.

The lengths travel in place of the mask, which every layer, recomputation included, hands on to its
attention. They lie on the host, so attention can cut tensors without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.settings.messages.refusals import FlagError

# With one of these, a rank holds layers from several places.
_INTERLEAVED = (
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
    "pipeline_model_parallel_layout",
)


def document_lengths(position_ids: Tensor) -> Tensor:
    """Measure the documents of a micro-batch; a part of one at either end of a row counts as one.

    Args:
        position_ids: [B, S], 0 at the first token of each row and of each document.

    Returns:
        [D] int64 on the host, in the order of the rows: the number of tokens of each document.
        They sum to B * S, and no document lies in two rows.
    """
    (starts_D,) = (position_ids.flatten() == 0).nonzero(as_tuple=True)
    return torch.diff(starts_D, append=starts_D.new_tensor([position_ids.numel()])).cpu()


def are_lengths(attention_mask: Tensor | None) -> bool:
    """Whether these are lengths of documents in place of a mask, which is bool."""
    return attention_mask is not None and attention_mask.dtype == torch.int64


def attend_by_document(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Attend in each document by itself.

    Args:
        attend: causal attention of one document of L tokens, [1, N, L, H] of queries and
            [1, G, L, H] of keys and values to [1, N, L, H].
        query: [S, B, N, H].
        key: [S, B, G, H].
        value: [S, B, G, Hv]; values may have another size.
        lengths: see :func:`document_lengths`.

    Returns:
        [S, B, N, Hv].
    """
    num_positions, num_rows = query.shape[:2]
    # split, because the backward pass of a slice would fill a whole tensor for each document
    documents = [
        part.transpose(0, 1).flatten(0, 1).split(lengths.tolist()) for part in (query, key, value)
    ]
    outputs = [
        attend(*(part.transpose(0, 1).unsqueeze(0) for part in document))
        for document in zip(*documents, strict=True)
    ]
    whole = torch.cat([output.squeeze(0).transpose(0, 1) for output in outputs])
    return whole.unflatten(0, (num_rows, num_positions)).transpose(0, 1)


def lengths_travel(args: Any) -> bool:
    """Whether attention gets the lengths of the documents, and no mask.

    Args:
        args: Megatron's arguments.
    """
    return bool(args.reset_attention_mask and not args.create_attention_mask_in_dataloader)


def check_masks(args: Any, what: str) -> None:
    """Refuse to keep documents apart if upstream's mask would not reach every layer.

    Args:
        args: Megatron's arguments.
        what: the attention that needs a mask, in words.

    Raises:
        FlagError: there is no mask, or a pipeline stage between the first and the last, for which
            upstream loads no data.
    """
    if not args.reset_attention_mask:
        return
    if not args.create_attention_mask_in_dataloader:
        raise FlagError(
            "reset_attention_mask",
            True,
            " with --no-create-attention-mask-in-dataloader, and the attention of "
            f"{what} knows documents only by a mask",
            "leave the second out, or use --moe-dynamic-backend torch_native",
        )
    is_interleaved = any(getattr(args, name, None) for name in _INTERLEAVED)
    if args.pipeline_model_parallel_size > (1 if is_interleaved else 2):
        raise FlagError(
            "reset_attention_mask",
            True,
            f", and --pipeline-model-parallel-size is {args.pipeline_model_parallel_size}, but "
            "Megatron gives no mask to layers between the first stage and the last, and the "
            f"attention of {what} needs one",
            "use --moe-dynamic-backend torch_native, or 2 stages that are not interleaved",
        )
