"""Real text for benchmarks that must run without a tokenizer: the words of examples/data."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks import measure
from megatron_dynmoe.data.indexed import IndexedDatasetWriter, token_dtype


def corpus() -> list[str]:
    """The documents of examples/data."""
    texts = []
    for path in sorted((measure.ROOT / "examples" / "data").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    return texts


def words_as_tokens(vocab_size: int) -> Path:
    """These documents as Megatron's token files, one token per word, written once under runs/.

    The most frequent words have an id each, and take seven eighths of the vocabulary; the others
    share the remaining ids, by a hash. The last id ends a document.

    Returns:
        The path of the files, without .bin and .idx.
    """
    prefix = measure.ROOT / "runs" / f"words-{vocab_size}" / "text_document"
    if prefix.with_suffix(".idx").exists():
        return prefix
    documents = [re.findall(r"\w+|[^\w\s]", text) for text in corpus()]
    counts = Counter(word for words in documents for word in words)
    num_known = vocab_size * 7 // 8
    ids = {word: number for number, (word, _) in enumerate(counts.most_common(num_known))}
    num_shared = vocab_size - 1 - num_known
    for word in counts.keys() - ids.keys():
        ids[word] = num_known + zlib.crc32(word.encode()) % num_shared

    prefix.parent.mkdir(parents=True, exist_ok=True)
    writer = IndexedDatasetWriter(prefix, token_dtype(vocab_size))
    for words in documents:
        tokens = np.array([*(ids[word] for word in words), vocab_size - 1], writer.dtype)
        writer.add(tokens, np.array([len(tokens)], np.int32))
    writer.close()
    writer.publish()
    return prefix
