"""Megatron's indexed dataset on disk: tokens in PREFIX.bin, an index of documents in PREFIX.idx.

The .idx file, little-endian: 9 bytes of magic, the version (uint64, 1), the token type's code
(uint8), the number of sequences S and of document bounds D + 1 (uint64 each), then S sequence
lengths in tokens (int32), S sequence offsets in bytes (int64), and D + 1 document bounds as
sequence indices (int64). A document that encodes to no token has a bound but no sequence.
"""

import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
# The index is written this many lengths at a time.
CHUNK = 1 << 18


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron stores the tokens of a vocabulary of `vocab_size`."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class IndexedDatasetWriter:
    """Writes one dataset beside its target, under names that no reader takes for a finished one.

    `close` writes the index and `publish` renames both files; `discard` removes what is left.
    Memory does not grow with the dataset: document lengths are spooled to an unnamed file.

    Args:
        prefix: the target without .bin and .idx; its folder must exist.
        dtype: the token type, from `token_dtype`.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.dtype = np.dtype(dtype)
        self.targets = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]
        self._partial = [t.with_name(f".{t.name}.{os.getpid()}.partial") for t in self.targets]
        self.num_documents = self.num_sequences = self.num_tokens = 0
        # The file stays open until `close` or `discard`.
        self._bin = open(self._partial[0], "wb")  # noqa: SIM115
        self._lengths = tempfile.TemporaryFile(dir=prefix.parent)  # noqa: SIM115

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: [sum of lengths], of the writer's dtype, the documents one after another.
            lengths: [documents], int32, tokens in each document; 0 for an empty one.
        """
        self._bin.write(tokens.data)
        self._lengths.write(lengths.data)
        self.num_documents += len(lengths)
        self.num_sequences += int(np.count_nonzero(lengths))
        self.num_tokens += len(tokens)

    def close(self) -> None:
        """Write the index and flush both files to disk."""
        with open(self._partial[1], "wb") as idx:
            idx.write(MAGIC + struct.pack("<QB", 1, DTYPE_CODES[self.dtype]))
            idx.write(struct.pack("<QQ", self.num_sequences, self.num_documents + 1))
            for lengths in self._spooled_lengths():
                idx.write(lengths[lengths > 0].data)
            offset = 0
            for lengths in self._spooled_lengths():
                sizes = lengths[lengths > 0] * np.int64(self.dtype.itemsize)
                ends = offset + np.cumsum(sizes)
                idx.write((ends - sizes).data)
                offset = int(ends[-1]) if len(ends) else offset
            idx.write(np.zeros(1, np.int64).data)
            bound = 0
            for lengths in self._spooled_lengths():
                bounds = bound + np.cumsum(lengths > 0, dtype=np.int64)
                idx.write(bounds.data)
                bound = int(bounds[-1])
            _sync(idx)
        self._lengths.close()
        _sync(self._bin)
        self._bin.close()

    def publish(self) -> None:
        """Give both files their names, the index last: without an index, it is not a dataset."""
        bin_target, idx_target = self.targets
        idx_target.unlink(missing_ok=True)  # an old index must never stand beside new tokens
        self._partial[0].rename(bin_target)
        self._partial[1].rename(idx_target)

    def discard(self) -> None:
        """Close and remove all that was written but not published."""
        self._bin.close()
        self._lengths.close()
        for path in self._partial:
            path.unlink(missing_ok=True)

    def _spooled_lengths(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while data := self._lengths.read(CHUNK * 4):
            yield np.frombuffer(data, np.int32)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
