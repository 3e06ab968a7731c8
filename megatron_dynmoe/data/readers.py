"""Documents from files: JSON lines (plain, gzip, zstd) and Parquet, one record at a time."""

import codecs
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

# Rows decoded at a time from Parquet: small, because a row may be a whole book.
PARQUET_ROWS = 64
# Text may be compressed well by chance where there is little of it; below this (bytes) none is a
# bomb.
HARMLESS = 1 << 26
# In a message, how much is shown of what a file brought.
SHOWN_FIELDS = 10
# How files begin that are no JSON lines, whatever their name says; and what helps.
FOREIGN = {
    b"\x1f\x8b\x08": "gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd: let its name end in .zst",
    b"PAR1": "Parquet: let its name end in .parquet",
    b"\xfd7zXZ": "xz, which is not read: decompress it",
    b"BZh": "bzip2, which is not read: decompress it",
    b"PK\x03\x04": "zip, which is not read: unpack it",
}


class Limits(NamedTuple):
    """What a reader takes for text, and beyond which for a mistake or an attack.

    Attributes:
        line_bytes: of a line with its end, or of a text in Parquet.
        expansion: how many times larger a file may become when it is decompressed. Text is
            seldom compressed to less than a tenth.
    """

    line_bytes: int = 1 << 24
    expansion: int = 200


DEFAULT_LIMITS = Limits()


class Unreadable(ValueError):
    """One record that is no document; the message names file, line (or row) and reason."""


OnUnreadable = Callable[[Unreadable], None]


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """The input files named by `patterns`, each a path or a glob, in the order given.

    The files of one glob come sorted by name, so that the output does not depend on the file
    system.

    Raises:
        ValueError: a pattern names no file, a folder, or a file that was named before.
    """
    paths: dict[Path, None] = {}  # in order, and quick to look up in
    for pattern in patterns:
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise ValueError(f"input {pattern}: no such file, and no file matches it as a pattern")
        for name in names:
            path = Path(name)
            if path.is_dir():
                raise ValueError(f"input {name} is a folder: name its files, such as '{name}/*'")
            if path in paths:
                raise ValueError(f"input {name} is named twice: it would be read twice")
            paths[path] = None
    return list(paths)


def open_reader(
    path: Path,
    keys: Sequence[str],
    on_unreadable: OnUnreadable,
    limits: Limits = DEFAULT_LIMITS,
) -> "Reader":
    """The reader for `path`, chosen by its last suffix: .parquet, .gz, .zst, or plain JSON lines.

    Args:
        keys: the fields whose text is read, in this order.
        on_unreadable: called with every record that is no document; if it returns, the record is
            left out and reading goes on.
        limits: what is taken for text.
    """
    reader = ParquetReader if path.suffix == ".parquet" else JsonLinesReader
    return reader(path, keys, on_unreadable, limits)


class Reader:
    """Iterates over a file's documents: a tuple of texts (str, valid Unicode), one a key.

    Raises:
        ValueError: the file cannot be opened or decompressed, or becomes too large when it is;
            the message names the file.
        Unreadable: from `on_unreadable`, where that raises.
    """

    def __init__(
        self, path: Path, keys: Sequence[str], on_unreadable: OnUnreadable, limits: Limits
    ) -> None:
        self.path = path
        self.limits = limits
        self.keys = list(keys)
        self.on_unreadable = on_unreadable
        self.size = path.stat().st_size

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        raise NotImplementedError

    @property
    def position(self) -> int:
        """Bytes of the file (compressed, where it is) consumed so far."""
        raise NotImplementedError

    def _check_length(self, num_bytes: int, what: str) -> None:
        """Raise ValueError for what is too long to be a document."""
        if num_bytes > self.limits.line_bytes:
            raise ValueError(
                f"{what} is longer than {self.limits.line_bytes:,} bytes: if it is meant to be one "
                "document, raise --max-line-bytes"
            )

    def _check_expansion(self, num_bytes: int, compressed: int) -> None:
        """Raise ValueError for a file that is a bomb."""
        if num_bytes > max(HARMLESS, self.limits.expansion * compressed):
            raise ValueError(
                f"{self.path}: {compressed:,} bytes of it become more than "
                f"{self.limits.expansion} times as many when decompressed, which text does not: "
                "if it is meant to, raise --max-expansion"
            )

    def _texts(self, record: Any) -> tuple[str, ...]:
        """The texts of one record; raises ValueError with the reason if it is no document."""
        if not isinstance(record, dict):
            raise ValueError(f"no JSON object but {json.dumps(record)[:40]}")
        texts = []
        for key in self.keys:
            if key not in record:
                raise ValueError(f"no field '{key}' (it has {_names(record)})")
            text = record[key]
            if isinstance(text, bytes):
                text = text.decode("utf-8")
            elif not isinstance(text, str):
                raise ValueError(f"field '{key}' is no string but {json.dumps(text)[:40]}")
            elif not text.isascii():
                text.encode("utf-8")  # an escaped half of a surrogate pair is no Unicode text
            texts.append(text)
        return tuple(texts)


class JsonLinesReader(Reader):
    """One JSON object a line, UTF-8; plain, .gz or .zst."""

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        number = 0
        try:
            with open(self.path, "rb") as self._raw, self._decompressed() as stream:
                for number, line in enumerate(self._lines(stream), 1):
                    try:
                        self._check_length(len(line), "the line")
                        document = self._texts(self._parse(number, line))
                    except (ValueError, RecursionError) as error:
                        reason = _reason(error)
                        self.on_unreadable(Unreadable(f"{self.path}, line {number}: {reason}"))
                        continue
                    yield document
        except (EOFError, OSError, zlib.error) as error:
            # Every decompressor has its own exception for a truncated or damaged file.
            raise ValueError(f"{self.path}: cannot be read after line {number}: {error}") from error

    def _lines(self, stream: IO[bytes]) -> Iterator[bytes]:
        """The lines, of one that is too long only so much that it can be told to be."""
        most = self.limits.line_bytes + 1
        num_bytes = 0
        while line := stream.readline(most):
            yield line
            while line:
                num_bytes += len(line)
                if stream is not self._raw and num_bytes > HARMLESS:
                    self._check_expansion(num_bytes, self._raw.tell())
                line = b"" if line.endswith(b"\n") else stream.readline(most)

    def _decompressed(self) -> IO[bytes]:
        if self.path.suffix == ".gz":
            return io.BufferedReader(_Gzip(fileobj=self._raw), 1 << 18)
        if self.path.suffix in (".zst", ".zstd"):
            import pyarrow

            # Unlike the zstandard package's stream, Arrow's raises on a truncated file.
            return io.BufferedReader(pyarrow.CompressedInputStream(self._raw, "zstd"), 1 << 18)
        start = self._raw.peek(max(map(len, FOREIGN)))
        for magic, meaning in FOREIGN.items():
            if start.startswith(magic):
                raise ValueError(f"{self.path}: its content is {meaning}")
        return self._raw

    @staticmethod
    def _parse(number: int, line: bytes) -> Any:
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        text = line.decode("utf-8")
        if not text.strip():
            raise ValueError("the line is empty")
        return json.loads(text)

    @property
    def position(self) -> int:
        return self._raw.tell() if hasattr(self, "_raw") and not self._raw.closed else 0


class ParquetReader(Reader):
    """One document a row, from columns of strings."""

    _rows = 0
    _rows_total = 1

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        import pyarrow
        import pyarrow.parquet

        try:
            # Without a pre-buffer and with a stream's buffer, a row group is not held whole.
            file = pyarrow.parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
            with file:
                self._check_columns(file.schema_arrow)
                self._check_sizes(file.metadata)
                self._rows_total = file.metadata.num_rows
                for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=self.keys):
                    # As bytes, so that a row that is not UTF-8 is that row's error only.
                    columns = {
                        key: batch.column(key).cast(pyarrow.large_binary()).to_pylist()
                        for key in self.keys
                    }
                    for row in range(batch.num_rows):
                        self._rows += 1
                        try:
                            texts = {key: columns[key][row] for key in self.keys}
                            for text in texts.values():
                                self._check_length(len(text or b""), "the text")
                            document = self._texts(texts)
                        except ValueError as error:
                            message = f"{self.path}, row {self._rows}: {_reason(error)}"
                            self.on_unreadable(Unreadable(message))
                            continue
                        yield document
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            # Arrow decodes the columns' names only where they are asked for.
            raise ValueError(
                f"{self.path}: cannot be read after row {self._rows}: {error}"
            ) from error

    def _check_columns(self, schema: Any) -> None:
        import pyarrow.types as types

        text_types = (types.is_string, types.is_large_string, types.is_string_view)
        for key in self.keys:
            if key not in schema.names:
                raise ValueError(
                    f"{self.path}: no column '{key}'; its columns are {', '.join(schema.names)}: "
                    "name the text column with --json-keys"
                )
            kind = schema.field(key).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not any(is_text(kind) for is_text in text_types):
                raise ValueError(f"{self.path}: column '{key}' is {kind}, not string")

    def _check_sizes(self, metadata: Any) -> None:
        compressed = uncompressed = 0
        for group in range(metadata.num_row_groups):
            columns = metadata.row_group(group)
            for i in range(columns.num_columns):
                if columns.column(i).path_in_schema in self.keys:
                    compressed += columns.column(i).total_compressed_size
                    uncompressed += columns.column(i).total_uncompressed_size
        self._check_expansion(uncompressed, compressed)

    @property
    def position(self) -> int:
        return self.size * self._rows // max(self._rows_total, 1)


class _Gzip(gzip.GzipFile):
    """Hands on all it has before it raises: else the lines before a cut would be lost, too."""

    readinto = gzip.GzipFile.readinto1


def _names(record: dict[str, Any]) -> str:
    """The names of some fields, in printable characters: they may be anything."""
    names = [name if name.isprintable() else ascii(name) for name in record]
    more = f" and {len(names) - SHOWN_FIELDS:,} more" if len(names) > SHOWN_FIELDS else ""
    return ", ".join(name[:40] for name in names[:SHOWN_FIELDS]) + more or "none"


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8 (byte {error.start}: {error.reason})"
    if isinstance(error, UnicodeEncodeError):
        return "its text has half of a surrogate pair, which is no Unicode character"
    if isinstance(error, RecursionError):
        return "not valid JSON (nested too deeply)"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno})"
    return str(error)
