"""Says what a token looks like, and whether it is a whole word of the text."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from megatron_dynmoe.use.token_display import BYTE_PIECE, REPLACEMENT, Detokenizer, printable

# The signs of SentencePiece and of byte-level BPE for a space at the beginning of a token
SPACE_MARKS = ("\u2581", "\u0120")
VISIBLE = str.maketrans({" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"})


class Letters(NamedTuple):
    """For each id of the vocabulary, [V] bool."""

    after_space: np.ndarray  # begins with a space
    only: np.ndarray  # consists, after that, of letters
    begin: np.ndarray  # begins with a letter
    end: np.ndarray  # ends with one


def letters_of(tokenizer: Any, vocab_size: int) -> Letters:
    """Which tokens begin with, end with and consist of letters; special tokens have none."""
    letters = Letters(*(np.zeros(vocab_size, dtype=bool) for _ in Letters._fields))
    special = set(tokenizer.all_special_ids)
    for token in range(min(len(tokenizer), vocab_size)):
        piece = tokenizer.convert_ids_to_tokens(token)
        if not piece or token in special or BYTE_PIECE.fullmatch(piece):
            continue
        body = piece.lstrip("".join(SPACE_MARKS) + " ")
        letters.after_space[token] = body != piece
        letters.only[token] = body.isalpha()
        letters.begin[token] = piece[0].isalpha() and piece[0] not in SPACE_MARKS
        letters.end[token] = bool(body) and body[-1].isalpha()
    return letters


def whole_words(tokens_WS: np.ndarray, letters: Letters) -> np.ndarray:
    """Which tokens between a window's first and last are whole words, [W, S - 2] bool.

    A whole word consists of letters only, and no letter is joined to it on either side: "tr" of
    "tree" is none, nor is "the" of "the" + "y".
    """
    before, here, after = tokens_WS[:, :-2], tokens_WS[:, 1:-1], tokens_WS[:, 2:]
    begins = letters.after_space[here] | ~letters.end[before]
    ends = letters.after_space[after] | ~letters.begin[after]
    return letters.only[here] & begins & ends


def token_text(tokenizer: Any, token: int) -> str:
    """A token in readable form: spaces and line breaks as signs, bytes as ``<0xE2>``."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if not piece:
        return f"(id {token})"
    if BYTE_PIECE.fullmatch(piece) or token in tokenizer.all_special_ids:
        return "\u23ce" if piece == "<0x0A>" else piece
    text = piece.replace(SPACE_MARKS[0], " ")
    if text == piece:
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        text = piece if REPLACEMENT in text else text  # a part of a character
    return printable(text.translate(VISIBLE))


class Piece(NamedTuple):
    """A piece of the text sample: one token, or several if only together they are text."""

    text: str
    experts_L: list[float]
    loss: float | None  # nats, of all its tokens; None if it has none


def pieces_of(
    tokenizer: Any, tokens: list[int], experts_LT: np.ndarray, loss_T: list[float | None]
) -> list[Piece]:
    """Text with the mean experts of its tokens in each layer; special tokens are left out.

    Args:
        tokens: ids.
        experts_LT: [L, T] integers.
        loss_T: nats.
    """
    detokenizer = Detokenizer(tokenizer)
    pieces: list[Piece] = []
    members: list[int] = []

    def emit(text: str) -> None:
        if text and members:
            losses = [loss_T[i] for i in members]
            known = [loss for loss in losses if loss is not None]
            means = experts_LT[:, np.array(members)].mean(axis=1).round(2).tolist()
            pieces.append(Piece(printable(text), means, round(sum(known), 3) if known else None))
            members.clear()

    for i, token in enumerate(tokens):
        if not detokenizer.is_special(token):
            members.append(i)
        emit(detokenizer.add(token))
    emit(detokenizer.finish())
    return pieces
