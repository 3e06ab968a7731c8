"""Reads documents from JSON lines and plain text (gzip, zstd, or neither), and from Parquet."""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_dynmoe.data.text.inputs import COMPRESSED, is_plain_text
from megatron_dynmoe.data.text.records import (
    DEFAULT_LIMITS,
    HARMLESS,
    NAME_IT,
    Limits,
    OnUnreadable,
    Reader,
    Unreadable,
    how_to_convert,
    reason_of,
)

# So many rows are decoded from Parquet at a time: few, because a row may be a whole book.
PARQUET_ROWS = 64
# A plain text is one document. A longer one is split, and each piece of about so many characters
# is a document.
TXT_PIECE = 1 << 22
# Files that begin like this are not text, whatever their name says; the text names the remedy.
FOREIGN = {
    b"\x1f\x8b\x08": "gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd: let its name end in .zst",
    b"PAR1": "Parquet: let its name end in .parquet",
    b"\xfd7zXZ": "xz, which is not read: decompress it",
    b"BZh": "bzip2, which is not read: decompress it",
    b"PK\x03\x04": "zip, which is not read: unpack it",
    b"%PDF": "PDF, which is not read: make text of it, as pdftotext does",
    b"ARROW1": "Arrow, which is not read: make Parquet of it",
}


def open_reader(
    path: Path,
    keys: Sequence[str],
    on_unreadable: OnUnreadable,
    limits: Limits = DEFAULT_LIMITS,
) -> "Reader":
    """Open the reader for `path`, chosen by the ending of its name.

    The ending .parquet means Parquet, .txt plain text, any other one JSON lines. Plain text and
    JSON lines may be compressed; then .gz, .zst or .zstd comes last.

    Args:
        keys: the fields whose text is read, in this order. Plain text has no fields: it stands for
            the only key.
        on_unreadable: called with every record that is not a document; if it returns, the record is
            left out and reading goes on.
        limits: bounds on what counts as text.
    """
    if path.suffix.lower() == ".parquet":
        return ParquetReader(path, keys, on_unreadable, limits)
    reader = PlainTextReader if is_plain_text(path) else JsonLinesReader
    return reader(path, keys, on_unreadable, limits)


class StreamReader(Reader):
    """A stream of text, plain, .gz or .zst."""

    _raw: io.BufferedReader

    @property
    def position(self) -> int:
        return self._raw.tell() if hasattr(self, "_raw") and not self._raw.closed else 0

    def _decompressed(self) -> IO[bytes]:
        suffix = self.path.suffix.lower()
        if suffix == ".gz":
            return io.BufferedReader(_Gzip(fileobj=self._raw), 1 << 18)
        if suffix in (".zst", ".zstd"):
            import pyarrow

            # Unlike the zstandard package's stream, Arrow's raises on a truncated file.
            return io.BufferedReader(pyarrow.CompressedInputStream(self._raw, "zstd"), 1 << 18)
        start = self._raw.peek(max(map(len, FOREIGN)))
        for magic, meaning in FOREIGN.items():
            if start.startswith(magic):
                raise ValueError(f"{self.path}: its content is {meaning}")
        return self._raw


class JsonLinesReader(StreamReader):
    """One JSON object per line, in UTF-8."""

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        number = 0
        try:
            with open(self.path, "rb") as self._raw, self._decompressed() as stream:
                for number, line in enumerate(self._lines(stream), 1):
                    try:
                        self._check_length(len(line), "the line")
                        document = self._texts(self._parse(number, line))
                    except (ValueError, RecursionError) as error:
                        reason = reason_of(error)
                        self.on_unreadable(Unreadable(f"{self.path}, line {number}: {reason}"))
                        continue
                    yield document
        except (EOFError, OSError, zlib.error) as error:
            # Every decompressor has its own exception for a truncated or damaged file.
            raise ValueError(f"{self.path}: cannot be read after line {number}: {error}") from error

    def _lines(self, stream: IO[bytes]) -> Iterator[bytes]:
        """Yield the lines; of one that is too long, only enough to recognize that it is."""
        most = self.limits.line_bytes + 1
        num_bytes = 0
        while line := stream.readline(most):
            yield line
            while line:
                num_bytes += len(line)
                if stream is not self._raw and num_bytes > HARMLESS:
                    self._check_expansion(num_bytes, self._raw.tell())
                line = b"" if line.endswith(b"\n") else stream.readline(most)

    def _parse(self, number: int, line: bytes) -> Any:
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        text = line.decode("utf-8")
        if not text.strip():
            raise ValueError("the line is empty")
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            if number > 1:
                raise
            hint = "each line has to be an object"
            if not text.lstrip().startswith(("{", "[")):
                ending = self.path.suffix if self.path.suffix.lower() in COMPRESSED else ""
                hint = f"the name of plain text ends in .txt{ending}"
            raise ValueError(f"{reason_of(error)}: {hint}") from error


class PlainTextReader(StreamReader):
    """Plain UTF-8 with line ends turned into `\\n`: one document, or several if it is long.

    Each piece of about `TXT_PIECE` characters ends with a line, or else with a word.
    """

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        if len(self.keys) > 1:
            raise ValueError(
                f"{self.path} is plain text, without the fields {', '.join(self.keys)}"
            )
        try:
            with open(self.path, "rb") as self._raw, self._decompressed() as stream:
                yield from ((piece,) for piece in self._pieces(stream))
        except UnicodeDecodeError as error:
            # A damaged file stops the run. But this file may be whole, and not meant as UTF-8.
            message = f"{self.path}: not valid UTF-8 ({error.reason}): {how_to_convert(error)}"
            self.on_unreadable(Unreadable(message))
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{self.path}: cannot be read to its end: {error}") from error

    def _pieces(self, stream: IO[bytes]) -> Iterator[str]:
        characters = io.TextIOWrapper(stream, encoding="utf-8-sig")
        text, num_bytes = "", 0
        while more := characters.read(TXT_PIECE - len(text)):
            if not num_bytes:
                self._refuse_json_lines(more)
            num_bytes += len(more)
            if stream is not self._raw and num_bytes > HARMLESS:
                self._check_expansion(num_bytes, self._raw.tell())
            text += more
            if len(text) == TXT_PIECE:
                cut = (text.rfind("\n") + 1) or (text.rfind(" ") + 1) or len(text)
                yield text[:cut]
                text = text[cut:]
        if text:
            yield text

    def _refuse_json_lines(self, start: str) -> None:
        """Raise ValueError if the text would be read with all its braces and field names."""
        if not start.startswith("{"):
            return
        try:
            json.loads(start.partition("\n")[0])
        except (ValueError, RecursionError):
            return
        raise ValueError(
            f"{self.path}: its content is JSON lines: let its name end in .jsonl (or begin it with "
            "an empty line, if the braces are meant to be text)"
        )


class ParquetReader(Reader):
    """One document per row, from columns of strings."""

    _rows = 0
    _rows_total = 1

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        import pyarrow
        import pyarrow.parquet

        try:
            # Without a pre-buffer and with a stream's buffer, Arrow holds no whole row group.
            file = pyarrow.parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
            with file:
                self._check_columns(file.schema_arrow)
                self._check_sizes(file.metadata)
                self._rows_total = file.metadata.num_rows
                for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=self.keys):
                    # Bytes are read, so that a row that is not UTF-8 is an error of that row only.
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
                            message = f"{self.path}, row {self._rows}: {reason_of(error)}"
                            self.on_unreadable(Unreadable(message))
                            continue
                        yield document
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            # Arrow decodes the names of the columns only when somebody asks for them.
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
                    f"{NAME_IT}"
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
    """Passes on all it has before it raises; else the lines before a cut would be lost, too."""

    readinto = gzip.GzipFile.readinto1
