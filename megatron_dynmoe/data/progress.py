"""Shows the progress on stderr: as a bar on a terminal, else as a line now and then."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tqdm import tqdm

from megatron_dynmoe.data.text.records import Reader

SECONDS_BETWEEN_LINES = 30.0
BAR = "{percentage:3.0f}%|{bar:24}| {elapsed}, {remaining} left, {postfix}"


class Progress:
    """Counts bytes of the input files as they lie on disk, so that the remaining time is known.

    Args:
        paths: all input files.
        log_interval: documents between lines if stderr is no terminal; if None, a line comes every
            30 seconds.
    """

    def __init__(self, paths: Sequence[Path], log_interval: int | None) -> None:
        self._total = sum(path.stat().st_size for path in paths)
        self._log_interval = log_interval
        self._finished_files = 0
        self._reader: Reader | None = None
        self._started = self._last_line = time.monotonic()
        self._last_documents = 0
        self._bar = (
            tqdm(total=self._total, bar_format=BAR, mininterval=0.2, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @contextmanager
    def reading(self, reader: Reader) -> Iterator[None]:
        """Wrap the reading of one file."""
        self._reader = reader
        yield
        self._reader = None
        self._finished_files += reader.size

    def update(self, documents: int, text_bytes: int) -> None:
        """Show the counts so far: documents written and the bytes of their text."""
        done = self._finished_files + (self._reader.position if self._reader else 0)
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        rates = f"{documents / seconds:,.0f} documents/s, {text_bytes / 1e6 / seconds:.2f} MB/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{documents:,} documents, {rates}", refresh=False)
            self._bar.update(done - self._bar.n)
            return
        due = (
            now - self._last_line >= SECONDS_BETWEEN_LINES
            if self._log_interval is None
            else documents - self._last_documents >= self._log_interval
        )
        if due:
            self._last_line, self._last_documents = now, documents
            left = seconds * (self._total - done) / max(done, 1)
            share = 100 * done / max(self._total, 1)
            message = f"{share:.0f} %: {documents:,} documents, {rates}, {left:.0f} s left"
            print(message, file=sys.stderr, flush=True)
