"""Decides which tokens see which (padding, packed documents, cache), and checks what is given.

Transformers makes the masks. Here is what it leaves to a model: where the positions of a row begin,
which tokens are padding, and where documents that are packed in a row begin, also with padding
between them. What cannot be honored is refused. Exported models ship with this file, so it imports
nothing from the package. Dimension letters are those of ``modeling_dynmoe``.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask

# Only flash attention reads these. They describe packed documents.
_OF_FLASH_ATTENTION = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What Transformers' own wrappers read, or what has no meaning for this model at these values.
# `transformers serve` gives every generation its tokenizer, for strings that end a text.
_READ_ELSEWHERE = (
    *("output_attentions", "output_hidden_states", "return_dict", "cache_position", "tokenizer"),
)


class Rows(NamedTuple):
    """How the tokens of a forward lie in their rows.

    Attributes:
        position_ids: [B or 1, S] int64.
        valid_BS: bool, False for padding; None: there is none.
        mask: what the attention takes, of whatever kind its implementation has; None: causal.
        is_packed: whether a row holds several documents; a compiled forward cannot ask for that.
    """

    position_ids: Tensor
    valid_BS: Tensor | None
    mask: Any
    is_packed: bool


def read_rows(
    config: PreTrainedConfig,
    attention_mask: Any,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    hidden_BSD: Tensor,
    use_cache: bool | None,
    keywords: dict[str, Any],
) -> Rows:
    """Read the arguments of ``DynMoEModel.forward``, which describes them.

    Raises:
        ValueError: they do not fit together, or the attention cannot honor them.
    """
    batch, num_positions = hidden_BSD.shape[:2]
    num_cached: Any = 0 if past_key_values is None else past_key_values.get_seq_length()
    if position_ids is not None and tuple(position_ids.shape) not in (
        (batch, num_positions),
        (1, num_positions),
    ):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}: give [{batch}, {num_positions}] "
            f"or [1, {num_positions}]."
        )
    if attention_mask is not None and not _is_2d(attention_mask):
        num_keys = num_positions
        if past_key_values is not None:
            num_keys = past_key_values.get_mask_sizes(num_positions, 0)[0]
        engine = serves_itself(config, keywords)
        mask, valid_BS = _prepared_mask(config, attention_mask, hidden_BSD, num_keys, engine)
        if position_ids is None:
            position_ids = _count_positions(None, num_cached, hidden_BSD)
        return Rows(position_ids, valid_BS, mask, False)

    # 1. Padding and positions
    compiling = torch.compiler.is_compiling()
    if not compiling:
        num_cached = int(num_cached)  # a static cache has a tensor
        attention_mask = _checked(attention_mask, num_cached, past_key_values, hidden_BSD)
    valid_BK = None if attention_mask is None else attention_mask.bool()
    valid_BS = None
    if valid_BK is not None:
        valid_BS = valid_BK[:, _columns(num_cached, hidden_BSD)]
    if position_ids is None:
        position_ids, documents_BS = _count_positions(valid_BK, num_cached, hidden_BSD), None
    elif serves_itself(config, keywords) or (compiling and past_key_values is not None):
        documents_BS = None
    else:
        _check_continues(position_ids, valid_BK, num_cached)
        documents_BS = find_documents(position_ids, valid_BS)

    # 2. The mask
    together = None
    if documents_BS is not None:
        if not compiling:
            has_cache = bool(use_cache) or past_key_values is not None
            _check_packing(config, has_cache, valid_BS is not None, batch)
        together = _same_document(documents_BS.expand(batch, -1))
    mask = create_causal_mask(
        config=config,
        inputs_embeds=hidden_BSD,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        and_mask_function=together,
    )
    return Rows(position_ids, valid_BS, mask, documents_BS is not None and not compiling)


def serves_itself(config: PreTrainedConfig, keywords: Mapping[str, Any] | None = None) -> bool:
    """Whether attention has masks of its own: an engine's, or flash attention's with lengths."""
    keywords = keywords or {}
    return (
        config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS
        or keywords.get("cache") is not None  # Transformers' continuous batching
        or keywords.get("cu_seq_lens_q") is not None
    )


def check_keywords(
    keywords: dict[str, Any], config: PreTrainedConfig, forward: Callable[..., Any]
) -> None:
    """Refuse keywords that nothing reads, unless they say nothing.

    A keyword may be ignored if it is None. Transformers may pass ``is_causal``, and a tokenizer
    ``token_type_ids``, which are 0 for a text. An engine passes its attention what it needs.

    Raises:
        ValueError: a keyword describes packed documents, and ignoring it would be wrong.
        TypeError: any other keyword is unknown.
    """
    name = config._attn_implementation
    if name not in ALL_MASK_ATTENTION_FUNCTIONS or keywords.get("cache") is not None:
        return
    for keyword, value in keywords.items():
        if value is None or keyword in _READ_ELSEWHERE:
            continue
        if keyword == "is_causal" and value is True:
            continue
        if keyword == "token_type_ids" and not value.any():
            continue
        if keyword in _OF_FLASH_ATTENTION or keyword == "seq_idx":
            if keyword != "seq_idx" and _is_flash(config):
                continue
            raise ValueError(
                f"{keyword} is given, which {name} attention does not read: tell packed documents "
                "apart by position_ids that begin again (DataCollatorWithFlattening gives them by "
                "default)."
            )
        near = difflib.get_close_matches(keyword, inspect.signature(forward).parameters, n=1)
        meant = f": did you mean {near[0]!r}?" if near else "."
        raise TypeError(f"forward() got an unexpected keyword argument {keyword!r}{meant}")


def find_documents(position_ids: Tensor, valid_BS: Tensor | None) -> Tensor | None:
    """Number the documents that are packed in each row, from their positions.

    A token that is not padding begins a document unless its position is that of the valid token
    before it plus one, or plus one and the padding between the two.

    Args:
        position_ids: [B or 1, S] int64.
        valid_BS: [B, S] bool, False for padding; None: no padding.

    Returns:
        The document of each token, [B or 1, S] int64 from 0; None if no row has two documents. A
        compiled forward cannot ask for that and always gets the numbers, unless S is 1.
    """
    if position_ids.shape[1] == 1:
        return None
    if valid_BS is None:
        goes_on = position_ids.diff() == 1
    else:
        columns_S = torch.arange(position_ids.shape[1], device=position_ids.device)
        position_ids = position_ids.expand_as(valid_BS)
        last_valid = torch.where(valid_BS, columns_S, -1).cummax(dim=-1).values[:, :-1]
        steps = position_ids[:, 1:] - position_ids.gather(-1, last_valid.clamp(min=0))
        goes_on = (steps == 1) | (steps == columns_S[1:] - last_valid)
        goes_on |= ~valid_BS[:, 1:] | (last_valid < 0)
    if not torch.compiler.is_compiling() and goes_on.all():
        return None
    return F.pad((~goes_on).cumsum(dim=-1), (1, 0))


def _is_2d(attention_mask: Any) -> bool:
    return isinstance(attention_mask, Tensor) and attention_mask.dim() == 2


def _is_flash(config: PreTrainedConfig) -> bool:
    return "flash_attention" in (config._attn_implementation or "")


def _columns(num_cached: Any, hidden_BSD: Tensor) -> Tensor:
    """The places of the new tokens in their rows, [S]; ``num_cached`` may be a tensor."""
    return torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device) + num_cached


def _count_positions(valid_BK: Tensor | None, num_cached: Any, hidden_BSD: Tensor) -> Tensor:
    """Positions [B or 1, S] of the new tokens, from 0 for a sequence's first valid token."""
    columns_S = _columns(num_cached, hidden_BSD)
    if valid_BK is None:
        return columns_S.unsqueeze(0)
    return (valid_BK.long().cumsum(dim=-1) - 1).clamp(min=0)[:, columns_S]


def _checked(
    attention_mask: Tensor | None, num_cached: int, cache: Cache | None, hidden_BSD: Tensor
) -> Tensor | None:
    """The mask [B, K], or None if there is no padding."""
    if attention_mask is None:
        return None
    batch, num_positions = hidden_BSD.shape[:2]
    lengths = [num_cached + num_positions]
    if cache is not None:
        lengths.append(cache.get_mask_sizes(num_positions, 0)[0])
    if attention_mask.shape[0] != batch or attention_mask.shape[1] not in lengths:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give [{batch}, "
            f"{lengths[0]}], one entry for each position in the cache and of the input."
        )
    if (attention_mask == 1).all():
        return None
    if (attention_mask != attention_mask.bool()).any():
        raise ValueError(
            "attention_mask has values other than 0 (padding) and 1: tell packed documents apart "
            "by position_ids that begin again."
        )
    return attention_mask


def _prepared_mask(
    config: PreTrainedConfig, mask: Any, hidden_BSD: Tensor, num_keys: int, engine: bool
) -> tuple[Any, Tensor | None]:
    """A mask that says for every two tokens whether one sees the other, and who sees any.

    A token that sees none is padding: so are those in the masks that ``generate`` makes for a
    static cache.
    """
    name, (batch, num_positions) = config._attn_implementation, hidden_BSD.shape[:2]
    if not isinstance(mask, Tensor):
        if name == "flex_attention" and len(getattr(mask, "shape", ())) == 4:
            return mask, None
        raise ValueError(f"attention_mask is a {type(mask).__name__}, which {name} cannot take.")
    if (
        mask.dim() != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, config.num_attention_heads)
        or mask.shape[2] != num_positions
        or (mask.shape[3] != num_keys and not engine)
    ):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: give [{batch}, {num_keys}], 0 for "
            f"padding, or [{batch}, 1, {num_positions}, {num_keys}], whether a token sees another."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"attention_mask has 4 dimensions and is {mask.dtype}: give bool, True where a token "
            "sees another, or floating-point numbers to add to the attention's scores."
        )
    if _is_flash(config) and not engine:
        raise ValueError(
            f"attention_mask has 4 dimensions, which {name} cannot take: load the model with "
            "attn_implementation='sdpa', or tell packed documents apart by position_ids."
        )
    lowest = torch.finfo(hidden_BSD.dtype).min
    if mask.dtype == torch.bool:
        sees = mask
        if name != "sdpa":
            mask = torch.zeros_like(mask, dtype=hidden_BSD.dtype).masked_fill(~mask, lowest)
    else:
        sees = mask > torch.finfo(mask.dtype).min / 2
        mask = mask.to(hidden_BSD.dtype).clamp(min=lowest)
    return mask, sees.any(dim=-1).any(dim=1).expand(batch, -1)


def _check_continues(position_ids: Tensor, valid_BK: Tensor | None, num_cached: Any) -> None:
    """Check that positions continue after the cache.

    If a row has n tokens in the cache, it continues at position n or later. An earlier position
    would begin another document, and the cached tokens could not be hidden from it.
    """
    if torch.compiler.is_compiling() or not num_cached:
        return
    first_B, begins_again_B = position_ids[:, 0], position_ids[:, 0] < num_cached
    if valid_BK is not None:
        begins_again_B = (first_B < valid_BK[:, :num_cached].sum(-1)) & valid_BK[:, num_cached]
    if begins_again_B.any():
        raise ValueError(
            f"position_ids begin again, at {first_B.min()}, after {num_cached} positions in "
            "the cache, which does not tell documents apart: give the whole row with "
            "use_cache=False, or begin the document with an empty cache."
        )


def _check_packing(
    config: PreTrainedConfig, has_cache: bool, has_padding: bool, batch: int
) -> None:
    if has_cache:
        raise ValueError(
            "position_ids do not go on by one, so several documents are packed in a row, and "
            "a cache, which does not tell them apart, is to be used: give use_cache=False and "
            "no past_key_values, or one document a row."
        )
    if _is_flash(config) and (has_padding or batch != 1):
        # Flash attention reads documents from the positions of one row, and no padding beside.
        what = "padding" if has_padding else f"{batch} rows"
        raise ValueError(
            f"position_ids pack several documents in a row, and there is {what}, which "
            f"{config._attn_implementation} does not take together: give one row without padding, "
            "or load the model with attn_implementation='sdpa'."
        )


def _same_document(documents_BS: Tensor) -> Callable[..., Tensor]:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return documents_BS[batch, query] == documents_BS[batch, key]

    return sees
