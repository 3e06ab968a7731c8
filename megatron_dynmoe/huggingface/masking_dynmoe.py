"""Decides which tokens see which (padding, packed documents, cache), and checks keywords.

Several documents may lie in one row, one after another. As in every model of Transformers, a new
document starts if ``position_ids`` do not increase by one. Exported models ship with this file, so
it imports nothing from the package. Dimension letters are those of ``modeling_dynmoe``.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Besides position_ids, a collator may mark documents by these, for kernels that are not here.
_OF_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def refuse_unknown(keywords: dict[str, Any], forward: Callable[..., Any]) -> None:
    """Refuse keywords that ``forward`` has no parameter for, unless it may ignore them.

    It may ignore a keyword with the value None. Transformers may pass ``cache_position``, which the
    cache contains too, and ``is_causal``; a tokenizer may give ``token_type_ids``, which are 0 for
    a text.

    Raises:
        ValueError: a keyword describes packed documents, and ignoring it would be wrong.
        TypeError: any other keyword is unknown.
    """
    for name, value in keywords.items():
        if value is None or name == "cache_position" or (name == "is_causal" and value is True):
            continue
        if name == "token_type_ids" and not value.any():
            continue
        if name in _OF_PACKING:
            raise ValueError(
                f"{name} is given, which this model does not read: tell packed documents apart by "
                "position_ids that begin again (DataCollatorWithFlattening gives them by default)."
            )
        near = difflib.get_close_matches(name, inspect.signature(forward).parameters, n=1)
        meant = f": did you mean {near[0]!r}?" if near else "."
        raise TypeError(f"forward() got an unexpected keyword argument {name!r}{meant}")


def valid_positions(attention_mask: Tensor | None, num_positions: int) -> Tensor | None:
    """The attention mask as [B, K] bool, or None if there is no padding.

    Raises:
        ValueError: the mask has another shape, or values other than 0 and 1.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != num_positions:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give [batch, "
            f"{num_positions}], one entry for each position in the cache and of the input. Static "
            "caches are not supported."
        )
    valid_BK = attention_mask.bool()
    if valid_BK.all() and (attention_mask == 1).all():
        return None
    if (attention_mask != valid_BK).any():
        raise ValueError(
            "attention_mask has values other than 0 (padding) and 1: tell packed documents apart "
            "by position_ids that begin again."
        )
    return valid_BK


def count_positions(valid_BK: Tensor | None, num_cached: int, hidden_BSD: Tensor) -> Tensor:
    """Positions [B or 1, S] of the new tokens, from 0 for a sequence's first valid token."""
    if valid_BK is not None:
        return (valid_BK.long().cumsum(dim=-1) - 1).clamp(min=0)[:, num_cached:]
    last = num_cached + hidden_BSD.shape[1]
    return torch.arange(num_cached, last, device=hidden_BSD.device).unsqueeze(0)


def check_positions(
    position_ids: Tensor, valid_BK: Tensor | None, num_cached: int, hidden_BSD: Tensor
) -> None:
    """Check that given positions have the shape of the input and continue after the cache.

    If a row has n tokens in the cache, it continues at position n or later. An earlier position
    would begin another document, and the cached tokens could not be hidden from it.

    Raises:
        ValueError: the shape is another, or a position is too early.
    """
    batch, num_positions = hidden_BSD.shape[:2]
    if tuple(position_ids.shape) not in ((batch, num_positions), (1, num_positions)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}: give [{batch}, {num_positions}] "
            f"or [1, {num_positions}]."
        )
    if num_cached:
        first_B, begins_again_B = position_ids[:, 0], position_ids[:, 0] < num_cached
        if valid_BK is not None:
            begins_again_B = (first_B < valid_BK[:, :num_cached].sum(-1)) & valid_BK[:, num_cached]
        if begins_again_B.any():
            raise ValueError(
                f"position_ids begin again, at {first_B.min()}, after {num_cached} positions in "
                "the cache, which does not tell documents apart: give the whole row with "
                "use_cache=False, or begin the document with an empty cache."
            )


def find_documents(position_ids: Tensor, valid_BS: Tensor | None) -> Tensor | None:
    """Number the documents that are packed in each row, from their positions.

    A token that is not padding begins a document unless its position is that of the valid token
    before it plus one, or plus one and the padding between the two.

    Args:
        position_ids: [B or 1, S] int64.
        valid_BS: [B, S] bool, False for padding; None: no padding.

    Returns:
        The document of each token, [B or 1, S] int64 from 0; None if no row has two documents.
    """
    columns_S = torch.arange(position_ids.shape[1], device=position_ids.device)
    if valid_BS is None:
        goes_on = position_ids.diff() == 1
    else:
        position_ids = position_ids.expand_as(valid_BS)
        last_valid = torch.where(valid_BS, columns_S, -1).cummax(dim=-1).values[:, :-1]
        steps = position_ids[:, 1:] - position_ids.gather(-1, last_valid.clamp(min=0))
        goes_on = (steps == 1) | (steps == columns_S[1:] - last_valid)
        goes_on |= ~valid_BS[:, 1:] | (last_valid < 0)
    return None if goes_on.all() else F.pad((~goes_on).cumsum(dim=-1), (1, 0))


def causal_mask(
    valid_BK: Tensor | None,
    documents_BS: Tensor | None,
    num_cached: int,
    hidden_BSD: Tensor,
) -> Tensor | None:
    """Which token sees which, [B or 1, S, K] bool; None if attention's own causal mask is right.

    Padding sees itself, so that no softmax runs over an empty set.

    Args:
        documents_BS: from :func:`find_documents`; only without a cache.
    """
    num_positions = hidden_BSD.shape[1]
    if valid_BK is None and documents_BS is None and (num_cached == 0 or num_positions == 1):
        return None
    keys_K = torch.arange(num_cached + num_positions, device=hidden_BSD.device)
    queries_S1 = keys_K[num_cached:].unsqueeze(-1)
    mask_BSK = (keys_K <= queries_S1).unsqueeze(0)
    if documents_BS is not None:
        mask_BSK = mask_BSK & (documents_BS.unsqueeze(-1) == documents_BS.unsqueeze(1))
    if valid_BK is not None:
        mask_BSK = mask_BSK & valid_BK.unsqueeze(1) | (keys_K == queries_S1)
    return mask_BSK
