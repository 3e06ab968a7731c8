"""Records with fields of text, as read from a file, and the error for one that is none."""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# A short text may compress very well by chance. A file that decompresses to less than this many
# bytes is therefore no bomb.
HARMLESS = 1 << 26
# A message shows at most this many names from a file.
SHOWN_FIELDS = 10
# This helps if a file has no field of that name.
NAME_IT = "name the one with the text by --json-keys"


class Limits(NamedTuple):
    """The bounds beyond which a reader takes a text for a mistake or an attack.

    Attributes:
        line_bytes: bytes of a line with its end, or of a text in Parquet.
        expansion: how many times larger a file may become when it is decompressed. Text seldom
            compresses to less than a tenth.
    """

    line_bytes: int = 1 << 24
    expansion: int = 200


DEFAULT_LIMITS = Limits()


class Unreadable(ValueError):
    """A record that is not a document; the message names file, line (or row) and reason."""


OnUnreadable = Callable[[Unreadable], None]


class Reader:
    """Iterates over a file's documents: a tuple of texts (str, valid Unicode), one per key.

    Raises:
        ValueError: the file cannot be opened or decompressed, or it becomes too large then; the
            message names the file.
        Unreadable: raised by `on_unreadable`, if it raises.
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
        """Bytes of the file consumed so far; for a compressed file, compressed bytes."""
        raise NotImplementedError

    def _check_length(self, num_bytes: int, what: str) -> None:
        """Raise ValueError for a text that is too long to be a document."""
        if num_bytes > self.limits.line_bytes:
            raise ValueError(
                f"{what} is longer than {self.limits.line_bytes:,} bytes: if it is meant to be one "
                "document, raise --max-line-bytes"
            )

    def _check_expansion(self, num_bytes: int, compressed: int) -> None:
        """Raise ValueError for a decompression bomb."""
        if num_bytes > max(HARMLESS, self.limits.expansion * compressed):
            raise ValueError(
                f"{self.path}: {compressed:,} bytes of it become more than "
                f"{self.limits.expansion} times as many when decompressed, which text does not: "
                "if it is meant to, raise --max-expansion"
            )

    def _texts(self, record: Any) -> tuple[str, ...]:
        """The texts of one record; raise ValueError with the reason if it is not a document."""
        if not isinstance(record, dict):
            raise ValueError(f"no JSON object but {json.dumps(record)[:40]}")
        texts = []
        for key in self.keys:
            if key not in record:
                raise ValueError(f"no field '{key}' (it has {_names(record)}): {NAME_IT}")
            text = record[key]
            if isinstance(text, bytes):
                text = text.decode("utf-8")
            elif not isinstance(text, str):
                raise ValueError(f"field '{key}' is no string but {json.dumps(text)[:40]}")
            elif not text.isascii():
                text.encode("utf-8")  # half of an escaped surrogate pair is not Unicode text
            texts.append(text)
        return tuple(texts)


def _names(record: dict[str, Any]) -> str:
    """The names of some fields in printable characters, since they may be anything."""
    names = [name if name.isprintable() else ascii(name) for name in record]
    more = f" and {len(names) - SHOWN_FIELDS:,} more" if len(names) > SHOWN_FIELDS else ""
    return ", ".join(name[:40] for name in names[:SHOWN_FIELDS]) + more or "none"


def how_to_convert(error: UnicodeDecodeError) -> str:
    """The remedy for text that is not in UTF-8, with the command that makes it so."""
    if _is_utf_16(error):
        return "it is in UTF-16; convert it, as in iconv -f utf-16 -t utf-8"
    return "if it is in another encoding, convert it, as in iconv -f latin1 -t utf-8"


def _is_utf_16(error: UnicodeDecodeError) -> bool:
    """Whether the text begins with UTF-16's mark of the order of bytes, as its files do."""
    return error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def reason_of(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        reason = f"not valid UTF-8 (byte {error.start}: {error.reason})"
        return f"{reason}: {how_to_convert(error)}" if _is_utf_16(error) else reason
    if isinstance(error, UnicodeEncodeError):
        return "its text has half of a surrogate pair, which is no Unicode character"
    if isinstance(error, RecursionError):
        return "not valid JSON (nested too deeply)"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno})"
    return str(error)
