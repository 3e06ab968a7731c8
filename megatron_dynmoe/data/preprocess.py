"""The pipeline: it reads and batches documents, encodes them in threads, and writes in order.

One thread (the caller's) reads, parses and writes, which takes a few percent of the time;
`workers` threads encode whole batches. The encoders are native code that frees the interpreter
lock, so threads scale like processes and no document travels between processes.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_dynmoe.data.indexed import IndexedDatasetWriter, token_dtype
from megatron_dynmoe.data.progress import Progress
from megatron_dynmoe.data.text.inputs import expand_inputs
from megatron_dynmoe.data.text.readers import open_reader
from megatron_dynmoe.data.text.records import DEFAULT_LIMITS, Limits, OnUnreadable, Unreadable
from megatron_dynmoe.data.tokenizer import Tokenizer
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.messages.outputs import check_absent, check_parent

# A batch ends at this much text (characters) or this many documents. Larger batches leave a thread
# idle at the end, smaller ones cost more switches. Both numbers also bound the memory.
BATCH_CHARACTERS = 1 << 18
BATCH_DOCUMENTS = 4096

# The tokens of a batch, and the number of tokens of each document.
Encoded = tuple[np.ndarray, np.ndarray]


@dataclass
class Summary:
    """What a run did: counts, the size of the text in bytes of UTF-8, and the time in seconds.

    `prefixes` are the datasets that it wrote, as training names them.
    """

    prefixes: list[str] = field(default_factory=list)
    files: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: int = 0
    first_skipped: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        megabytes = self.text_bytes / 1e6
        source = f"{self.files:,} files" if self.files > 1 else "1 file"
        return (
            f"{self.documents:,} document{'s' * (self.documents != 1)} from {source}, "
            f"{self.tokens:,} tokens, {megabytes:.2f} MB of text in {self.seconds:.1f} s "
            f"({megabytes / self.seconds:.2f} MB/s, "
            f"{self.tokens / self.seconds:,.0f} tokens/s), {self.skipped:,} skipped"
        )


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: Tokenizer,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 2,
    skip_unreadable: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    overwrite: bool = False,
    log_interval: int | None = None,
) -> Summary:
    """Encode the documents of `inputs` into PREFIX_KEY_document.bin and .idx, one pair per key.

    The output depends only on documents and tokenizer, not on `workers`. It appears under its
    name once it is complete; an exception of any kind leaves no output.

    Args:
        inputs: files, folders or globs; see `inputs` and `readers`.
        append_eod: end every document that has a token with `tokenizer.eod`.
        workers: the number of threads that encode.
        skip_unreadable: leave out and count records that are not documents, instead of raising.
        limits: bounds on what counts as text.
        overwrite: replace an output that exists.
        log_interval: documents between progress lines if stderr is no terminal; if None, a line
            comes every 30 s.

    Returns:
        The counts, over all keys.

    Raises:
        UsageError: what is asked for cannot be: files that are not there, an output that exists.
        ValueError: a file cannot be read, or there is no document.
        Unreadable: a record is no document (names file and line), unless skipped.
        OSError: the output cannot be written.
    """
    started = time.perf_counter()
    paths = expand_inputs(inputs)
    prefixes = _output_prefixes(output_prefix, json_keys)
    if append_eod and tokenizer.eod is None:
        raise UsageError(
            "--append-eod is given, and the tokenizer has no end-of-document (eos) token: leave it "
            "out, or give another --tokenizer-model"
        )
    _check_targets(prefixes, overwrite)

    summary = Summary([str(prefix) for prefix in prefixes], len(paths))
    dtype = token_dtype(tokenizer.vocab_size)
    eod = np.array([tokenizer.eod] if append_eod else [], dtype)
    writers: list[IndexedDatasetWriter] = []
    try:
        for prefix in prefixes:
            try:
                writers.append(IndexedDatasetWriter(prefix, dtype))
            except OSError as error:
                raise UsageError(
                    f"--output-prefix is {output_prefix}: nothing can be written to "
                    f"{prefix.parent} ({error.strerror})"
                ) from error
        with Progress(paths, log_interval) as progress:
            batches = _batches(
                paths, json_keys, _policy(skip_unreadable, summary), limits, progress
            )
            for num_bytes, columns in _encode(batches, tokenizer, eod, workers):
                summary.text_bytes += num_bytes
                summary.documents += len(columns[0][1])
                for writer, (tokens, lengths) in zip(writers, columns, strict=True):
                    writer.add(tokens, lengths)
                progress.update(summary.documents, summary.text_bytes)
        if not summary.documents:
            raise ValueError(
                f"no documents in {', '.join(map(str, paths))}: nothing was written"
                + f" ({summary.skipped:,} skipped, first {summary.first_skipped})"
                * bool(summary.skipped)
            )
        for writer in writers:
            writer.close()
        _check_targets(prefixes, overwrite)  # another run may have finished in the meantime
        for writer in writers:
            writer.publish()
    finally:
        for writer in writers:
            writer.discard()
    summary.tokens = sum(writer.num_tokens for writer in writers)
    summary.seconds = time.perf_counter() - started
    return summary


@dataclass
class _Batch:
    """The texts of some documents: `columns[key][document]`, and their size in UTF-8 bytes."""

    columns: list[list[str]]
    num_characters: int = 0


def _batches(
    paths: Sequence[Path],
    keys: Sequence[str],
    policy: OnUnreadable,
    limits: Limits,
    progress: Progress,
) -> Iterator[_Batch]:
    batch = _Batch([[] for _ in keys])
    for path in paths:
        reader = open_reader(path, keys, policy, limits)
        with progress.reading(reader):
            for texts in reader:
                for column, text in zip(batch.columns, texts, strict=True):
                    column.append(text)
                    batch.num_characters += len(text)
                if (
                    batch.num_characters >= BATCH_CHARACTERS
                    or len(batch.columns[0]) >= BATCH_DOCUMENTS
                ):
                    yield batch
                    batch = _Batch([[] for _ in keys])
    if batch.columns[0]:
        yield batch


def _encode(
    batches: Iterator[_Batch], tokenizer: Tokenizer, eod: np.ndarray, workers: int
) -> Iterator[tuple[int, list[Encoded]]]:
    """Encode batches in `workers` threads and yield them in order: text bytes, then each key."""

    def encode(batch: _Batch) -> tuple[int, list[Encoded]]:
        num_bytes = sum(len(text.encode()) for column in batch.columns for text in column)
        return num_bytes, [_join(tokenizer.encode_batch(column), eod) for column in batch.columns]

    pending: deque[Future[tuple[int, list[Encoded]]]] = deque()
    pool = ThreadPoolExecutor(workers, "encode")
    try:
        for batch in batches:
            pending.append(pool.submit(encode, batch))
            # One batch per thread waits while each thread encodes one. That is enough to keep all
            # threads busy while this one writes, and it bounds the memory.
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _join(documents: Sequence[np.ndarray], eod: np.ndarray) -> Encoded:
    """Join all tokens in one array of `eod`'s dtype, with `eod` after each non-empty document."""
    parts: list[np.ndarray] = []
    for tokens in documents:
        if len(tokens):
            parts += (tokens, eod)
    lengths = np.array([len(tokens) for tokens in documents], np.int32)
    lengths[lengths > 0] += len(eod)
    joined = np.concatenate(parts) if parts else eod[:0]
    limit = np.iinfo(eod.dtype).max
    if len(joined) and joined.max() > limit:
        raise ValueError(f"the tokenizer gave id {joined.max()}, above its vocabulary's {limit}")
    return joined.astype(eod.dtype), lengths


def _policy(skip_unreadable: bool, summary: Summary) -> OnUnreadable:
    def on_unreadable(error: Unreadable) -> None:
        if not skip_unreadable:
            raise error
        summary.skipped += 1
        summary.first_skipped = summary.first_skipped or str(error)

    return on_unreadable


def _output_prefixes(output_prefix: str, keys: Sequence[str]) -> list[Path]:
    if len(set(keys)) < len(keys):
        raise UsageError(f"--json-keys is {' '.join(keys)}: a field is named twice")
    check_parent(output_prefix, "--output-prefix")
    return [Path(f"{output_prefix}_{key}_document") for key in keys]


def _check_targets(prefixes: Sequence[Path], overwrite: bool) -> None:
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            check_absent(prefix.with_name(prefix.name + suffix), overwrite, "--output-prefix")
