"""Encodes text as a model met it in training, with one begin and one end token per document.

Preprocessing encodes every document as the tokenizer does by itself. Many tokenizers begin a text
with a token of their own, and some end it with one. A prompt is the beginning of a document: it has
the begin token, but never the end token, which would say that the document is over.

All code that encodes text for a trained model uses this module.
"""

from __future__ import annotations

from typing import Any

# Any text works whose begin and end can be found among the ids.
_PROBE = "a b"


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text from the middle of a document: nothing is added."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that goes on in the middle of a word.

    Many tokenizers put a space before a text that stands alone; none puts it after a line break.
    """
    before = encode_text(tokenizer, "\n")
    ids = encode_text(tokenizer, "\n" + text)
    return ids[len(before) :] if ids[: len(before)] == before else encode_text(tokenizer, text)


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """The ids of the beginning of a document that the model is to continue.

    They are empty for an empty text, if the tokenizer has no begin token of its own.
    """
    begin, _ = added_ids(tokenizer)
    ids = encode_text(tokenizer, text)
    # The text itself may spell the begin token out, as chat templates do.
    return ids if begin and ids[: len(begin)] == begin else begin + ids


def encode_document(tokenizer: Any, text: str) -> list[int]:
    """The ids of a whole document: those of the prompt, and one end token if there is any."""
    ids, (_, end) = encode_prompt(tokenizer, text), around_document(tokenizer)
    return ids if end and ids[-len(end) :] == end else ids + end


def around_document(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids before and after the text of a document: begin token and end token, if any."""
    begin, end = added_ids(tokenizer)
    if not end and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]  # preprocessing adds it with --append-eod
    return begin, end


def added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer itself adds before and after a text."""
    bare = encode_text(tokenizer, _PROBE)
    ids = tokenizer(_PROBE, verbose=False)["input_ids"]
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return list(ids[:start]), list(ids[start + len(bare) :])
    raise ValueError(
        "the tokenizer changes a text when it adds its begin and end tokens, so it cannot be told "
        "what a prompt is: take the tokenizer that the model was trained with"
    )
