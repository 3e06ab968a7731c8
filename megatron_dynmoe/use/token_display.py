"""Shows text token by token, with the number of experts that each token used."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Backgrounds of the 256-color palette from few experts to many, light enough for black text.
PALETTE = (159, 123, 122, 121, 120, 156, 192, 228, 222, 216, 210, 203)
BLACK_ON = "\x1b[38;5;16;48;5;{}m"
RESET = "\x1b[0m"

BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
REPLACEMENT = "\ufffd"
# Decoding starts anew from a context of this length: short, because every token decodes all of it.
WINDOW_TOKENS = 32
# The text that a model writes must not control the terminal.
CONTROL_CHARACTERS = {code: REPLACEMENT for code in (*range(9), *range(11, 32), *range(127, 160))}


class Detokenizer:
    """Turns tokens into pieces of text that, put together, are the decoded whole.

    A piece is held back until no later token can change it: while the bytes of a character are
    incomplete, and while byte pieces (``<0xE2>``) continue, since one invalid byte makes the
    tokenizers library discard the whole run of them. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._window: list[int] = []
        self._shown = ""  # the shown part of the window's text

    def add(self, token: int) -> str:
        """The text that this token makes certain; often empty."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if self.is_special(token) or not name:  # a padded vocabulary has ids without a token
            return ""
        self._window.append(token)
        if BYTE_PIECE.fullmatch(name):
            return ""
        text = self._decode(self._window)
        piece = self._advance(text.rstrip(REPLACEMENT))
        if len(self._window) > WINDOW_TOKENS and self._shown == text:
            # One token stays, because decoding strips the space from the first one.
            self._window = [token]
            self._shown = self._decode(self._window)
        return piece

    def finish(self) -> str:
        """The text held back so far."""
        return self._advance(self._decode(self._window))

    def is_special(self, token: int) -> bool:
        return token in self._special

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._shown += piece
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class TokenDisplay:
    """Writes each piece as soon as its tokens and, if wanted, their counts are known.

    Tokens and counts come in any order and in any portions: a token's count is known only after the
    model has read it, one step after it was chosen. A piece of several tokens shows the mean over
    them.

    Args:
        write: takes text, such as ``sys.stdout.write``.
        paint: turns a piece and its mean experts into the text to write; if None, the piece itself
            is written, without waiting for counts.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], Any],
        paint: Callable[[str, float], str] | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self._counts: list[Tensor] = []
        self._means: list[float] = []  # the mean over layers, for each token
        self._detokenizer = Detokenizer(tokenizer)
        self._write, self._paint = write, paint
        self._num_shown = 0
        self._group: list[float] = []

    @property
    def counts_LT(self) -> Tensor:
        """[MoE layers, tokens], int64: the experts that each token used, as far as known."""
        return torch.cat(self._counts, dim=-1) if self._counts else torch.zeros(0, 0).long()

    def add_tokens(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)
        self._show()

    def add_counts(self, counts_LT: Tensor) -> None:
        """Add the counts, [MoE layers, tokens], of the next tokens."""
        self._counts.append(counts_LT.cpu())
        self._means.extend(self._counts[-1].double().mean(dim=0).tolist())
        self._show()

    def finish(self) -> None:
        """Write the pieces held back; tokens without a count are written as they are."""
        self._show(to_the_end=True)
        self._write_piece(self._detokenizer.finish())

    def _show(self, to_the_end: bool = False) -> None:
        ready = len(self.tokens)
        if self._paint is not None and not to_the_end:
            ready = min(ready, len(self._means))
        for i in range(self._num_shown, ready):
            counted = self._paint is not None and i < len(self._means)
            if counted and not self._detokenizer.is_special(self.tokens[i]):
                self._group.append(self._means[i])
            self._write_piece(self._detokenizer.add(self.tokens[i]))
        self._num_shown = max(self._num_shown, ready)

    def _write_piece(self, piece: str) -> None:
        if piece and self._paint is not None and self._group:
            piece = self._paint(piece, sum(self._group) / len(self._group))
            self._group = []
        if piece:
            self._write(piece)


def paint_digits(piece: str, mean: float) -> str:
    """Write ``word[1.8]``; if a piece ends with a line break, the figure stands before it."""
    text = piece.rstrip("\n")
    return f"{text}[{mean:.1f}]{piece[len(text) :]}"


class ColorScale:
    """Backgrounds by the mean experts of a token, in equal ratios from 1 to ``most``.

    The scale is of ratios, because from 1 to 2 experts is as much as from 8 to 16.
    """

    def __init__(self, most: int) -> None:
        self._log_most = math.log(max(most, 2))

    def paint(self, piece: str, mean: float) -> str:
        level = int(math.log(max(mean, 1.0)) / self._log_most * len(PALETTE))
        start = BLACK_ON.format(PALETTE[min(level, len(PALETTE) - 1)])
        # If a background is on at a line break, it colors the rest of the line.
        return "\n".join(f"{start}{line}{RESET}" if line else "" for line in piece.split("\n"))

    def legend(self) -> str:
        """One sample of each background, with the lowest number of experts that it stands for."""
        starts = [math.exp(i / len(PALETTE) * self._log_most) for i in range(len(PALETTE))]
        # Half-way into the level, so that rounding cannot give a sample its neighbor's color.
        step = math.exp(0.5 / len(PALETTE) * self._log_most)
        return " ".join(self.paint(f" {start:.1f} ", start * step) for start in starts)


def printable(text: str) -> str:
    """``text`` with every control character except line breaks and tabs replaced."""
    return text.translate(CONTROL_CHARACTERS)
