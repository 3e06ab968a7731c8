"""How tokens are shown, and which of them are whole words."""

import re
from typing import Any

import numpy as np

from megatron_dynmoe.analysis.counting.tokens import letters_of, pieces_of, token_text, whole_words


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_whole_words_are_those_between_no_letters(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    text = "It is a truth, (of) the theyx man's 12 days"
    tokens = ids(tokenizer, text)
    letters = letters_of(tokenizer, len(tokenizer))
    whole_T = whole_words(np.array([tokens]), letters)[0]
    pieces = [tokenizer.convert_ids_to_tokens(token) for token in tokens[1:-1]]
    words = {piece for piece, whole in zip(pieces, whole_T, strict=True) if whole}
    assert {"\u2581is", "\u2581a", "\u2581the"} <= words
    assert {piece.lstrip("\u2581") for piece in words} <= set(re.findall("[A-Za-z]+", text))


def test_tokens_are_readable(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    shown = {token_text(tokenizer, token) for token in range(len(tokenizer))}
    assert "\u2423the" in shown
    assert "\u23ce" in shown
    assert "<0xE2>" in shown
    assert all(text and text.isprintable() for text in shown)
    assert token_text(tokenizer, 10**6) == "(id 1000000)"


def test_pieces_are_the_text(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    text = "a caf\u00e9 \U0001f600\nfor two \u202e"
    tokens = [*ids(tokenizer, text), 2]
    experts_LT = np.arange(2 * len(tokens)).reshape(2, -1)
    pieces = pieces_of(tokenizer, tokens, experts_LT, [None, *[1.0] * (len(tokens) - 1)])
    assert "".join(piece.text for piece in pieces) == text
    assert all(len(piece.experts_L) == 2 for piece in pieces)
    assert pieces[0].loss is None
    smile = next(piece for piece in pieces if "\U0001f600" in piece.text)
    assert smile.loss > 1  # of several tokens
