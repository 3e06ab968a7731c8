"""Checks that token files are whole and agree with the tokenizer."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check, guarded
from megatron_dynmoe.data.indexed import MAGIC
from megatron_dynmoe.settings.messages.words import is_number

# Megatron reads these codes of token types. We write two of them.
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
HEADER = struct.Struct("<9sQBQQ")
# If a file is larger, only this many bytes are checked, in pieces spread evenly over it.
MAX_BYTES_READ = 1 << 30
PIECE_BYTES = 1 << 24
MIN_PIECES = 64
SEQUENCES_AT_ONCE = 1 << 20
DOCUMENTS_LOOKED_AT = 1000


class Vocabulary(NamedTuple):
    """The vocabulary that the data has to agree with; ``eod`` is None if it is unknown."""

    size: int
    eod: int | None
    source: str


class Index(NamedTuple):
    """The content of an .idx file."""

    dtype: np.dtype
    lengths: np.ndarray  # [sequences] int32, tokens
    offsets: np.ndarray  # [sequences] int64, bytes
    bounds: np.ndarray  # [documents + 1] int64, sequences

    @property
    def num_documents(self) -> int:
        """The number of documents, including empty ones."""
        return len(self.bounds) - 1

    def place(self, token: int) -> str:
        """The document of a token, counted from 0 like the text's lines, and its place in it."""
        sequence = int(np.searchsorted(self.offsets, token * self.dtype.itemsize, "right")) - 1
        document = int(np.searchsorted(self.bounds, sequence, "right")) - 1
        first = int(self.offsets[self.bounds[document]]) // self.dtype.itemsize
        return f"document {document:,}, token {token - first:,}"


def check_tokenizer(tokenizer_type: str | None, model: str) -> tuple[Check, Vocabulary | None]:
    """Load a tokenizer; if its type is not given, guess it from the path."""
    from megatron_dynmoe.data.tokenizer import build_tokenizer

    guess = "SentencePieceTokenizer" if model.endswith(".model") else "HuggingFaceTokenizer"
    vocabulary = None

    def load() -> Check:
        nonlocal vocabulary
        try:
            tokenizer = build_tokenizer(tokenizer_type or guess, model)
        except ValueError as error:
            remedy = "give the .model file, or the Hugging Face folder, and --tokenizer-type"
            return Check("tokenizer", FAILED, str(error), remedy)
        vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.eod, model)
        found = f"{model}: {tokenizer.vocab_size} ids, eod {tokenizer.eod}"
        if tokenizer.eod is None:
            remedy = "without one, documents of a sample run into each other unmarked"
            return Check("tokenizer", WARNING, found, remedy)
        return Check("tokenizer", PASSED, found)

    return guarded("tokenizer", load), vocabulary


def prefixes(data_path: Sequence[str]) -> list[str]:
    """The datasets in ``--data-path``, which may hold a weight before each."""
    if len(data_path) % 2 == 0 and all(is_number(word) for word in data_path[::2]):
        return list(data_path[1::2])
    return list(data_path)


def check_dataset(
    prefix: str, vocabulary: Vocabulary | None, max_bytes: int = MAX_BYTES_READ
) -> Check:
    """Check that PREFIX.bin and PREFIX.idx are whole, belong together and fit the vocabulary.

    Args:
        max_bytes: if the .bin file is larger, about this much of it is checked, spread evenly.
    """
    name = "data"
    try:
        index, tokens = read_dataset(prefix)
    except (OSError, ValueError) as error:
        return Check(name, FAILED, f"{prefix}: {error}", prefix_remedy(prefix))
    found = f"{prefix}: {len(tokens):,} tokens in {index.num_documents:,} documents"
    if not len(tokens):
        return Check(name, FAILED, found, "preprocess a text that is not empty")
    lowest, highest, num_read = _range(tokens, max_bytes)
    seen = "" if num_read == len(tokens) else f" among {num_read:,} looked at"
    found += f", highest id {highest:,}{seen}"
    if vocabulary is None:
        remedy = "give --tokenizer-model (or --vocab-size) to compare the ids with it"
        return Check(name, WARNING, found, remedy)
    if lowest < 0 or highest >= vocabulary.size:
        wrong = f"lowest id {lowest}" if lowest < 0 else f"{vocabulary.source} has ids to"
        wrong += "" if lowest < 0 else f" {vocabulary.size - 1:,}"
        wrong += f" (first in {index.place(_first_outside(tokens, vocabulary.size, max_bytes))})"
        remedy = "preprocess the text with the tokenizer of the run"
        return Check(name, FAILED, f"{found}; {wrong}", remedy)
    if vocabulary.eod is not None and not _ends_with(vocabulary.eod, index, tokens):
        remedy = "preprocess with --append-eod, which pre-training wants"
        return Check(name, WARNING, f"{found}; most documents do not end with eod", remedy)
    return Check(name, PASSED, found)


def read_dataset(prefix: str) -> tuple[Index, np.ndarray]:
    """Read the index, and the tokens as they lie on the disk.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is not what it should be, or the two files do not belong together.
    """
    idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
    if Path(prefix).suffix in (".bin", ".idx") and Path(prefix).exists():
        raise ValueError("a path of two files is given without their ending")
    for path in (idx, bin_):
        if not path.exists():
            raise ValueError(f"there is no {path.name}")
    with open(idx, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{idx.name} is no index of Megatron's")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(header)
    if version != 1 or code not in TOKEN_TYPES:
        raise ValueError(f"{idx.name} has version {version} and token type {code}")
    wanted = HEADER.size + num_sequences * 12 + num_bounds * 8
    if (size := idx.stat().st_size) < wanted:
        raise ValueError(f"{idx.name} has {size:,} bytes and should have {wanted:,}")
    content = np.memmap(idx, np.uint8, mode="r")
    lengths_at, offsets_at = HEADER.size, HEADER.size + 4 * num_sequences
    bounds_at = offsets_at + 8 * num_sequences
    lengths = content[lengths_at:offsets_at].view(np.int32)
    offsets = content[offsets_at:bounds_at].view(np.int64)
    bounds = content[bounds_at:wanted].view(np.int64)
    dtype = np.dtype(TOKEN_TYPES[code])
    num_tokens, size = int(lengths.sum(dtype=np.int64)), bin_.stat().st_size
    if size != num_tokens * dtype.itemsize:
        raise ValueError(
            f"{bin_.name} has {size:,} bytes, but {idx.name} speaks of "
            f"{num_tokens * dtype.itemsize:,}"
        )
    is_whole = num_bounds and bounds[0] == 0 and bounds[-1] == num_sequences
    in_order = is_whole and (np.diff(bounds) >= 0).all()
    if not in_order or (lengths < 0).any() or not _are_contiguous(offsets, lengths, dtype.itemsize):
        raise ValueError(f"{idx.name} is damaged: its bounds do not agree with each other")
    tokens = np.memmap(bin_, dtype, mode="r") if num_tokens else np.empty(0, dtype)
    return Index(dtype, lengths, offsets, bounds), tokens


def _are_contiguous(offsets: np.ndarray, lengths: np.ndarray, itemsize: int) -> bool:
    """Whether each sequence starts at the end of the one before it in the file."""
    if len(offsets) and offsets[0] != 0:
        return False
    for start in range(0, len(offsets) - 1, SEQUENCES_AT_ONCE):
        some = slice(start, start + SEQUENCES_AT_ONCE + 1)
        sizes = np.multiply(lengths[some][:-1], itemsize, dtype=np.int64)
        if not (np.diff(offsets[some])[: len(sizes)] == sizes).all():
            return False
    return True


def _range(tokens: np.ndarray, max_bytes: int) -> tuple[int, int, int]:
    """The lowest id, the highest id and how many tokens were checked."""
    pieces = [(int(p.min()), int(p.max()), len(p)) for _, p in _pieces(tokens, max_bytes)]
    lows, highs, counts = zip(*pieces, strict=True)
    return min(lows), max(highs), sum(counts)


def _first_outside(tokens: np.ndarray, size: int, max_bytes: int) -> int:
    """The position of the first id among those checked that is not below ``size``."""
    for start, piece in _pieces(tokens, max_bytes):
        outside = (piece < 0) | (piece >= size)
        if outside.any():
            return start + int(outside.argmax())
    raise AssertionError("none is outside")


def _pieces(tokens: np.ndarray, max_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    length = min(PIECE_BYTES, max(max_bytes // MIN_PIECES, 1)) // tokens.itemsize or 1
    stride = length * max(1, -(-tokens.nbytes // max_bytes))
    for start in range(0, len(tokens), stride):
        yield start, tokens[start : start + length]


def _ends_with(eod: int, index: Index, tokens: np.ndarray) -> bool:
    """Whether most of the first documents end with this id."""
    some = slice(0, DOCUMENTS_LOOKED_AT)
    ends = index.offsets[some] // index.dtype.itemsize + index.lengths[some] - 1
    return bool((tokens[ends[index.lengths[some] > 0]] == eod).mean() > 0.5)


def prefix_remedy(prefix: str) -> str:
    """What to do if a file of the dataset with this prefix is missing."""
    path = Path(prefix)
    if path.suffix in (".bin", ".idx"):
        return f"give {path.with_suffix('')}"
    is_there = any(Path(prefix + ending).exists() for ending in (".bin", ".idx"))
    near = sorted(path.parent.glob(path.name + "*.idx")) if path.parent.is_dir() else []
    if near and not is_there:
        return f"did you mean {near[0].with_suffix('')}?"
    return "make it with dynmoe preprocess, or copy both files again"
