"""Text files as windows of tokens: what the model reads at once, and the group it belongs to.

Windows depend on the text alone: each group's documents follow each other as in training and are
cut at every full length, whatever is read together later.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dynmoe.data.readers import Unreadable, open_reader

# A .txt file is one document; of a longer one, each piece of about this many characters.
TXT_PIECE = 2**22
# Groups need memory; further values of a source field are counted together.
MAX_GROUPS = 32
OTHER = "(other)"

OnRead = Callable[[int], Any]


class TextFile(NamedTuple):
    """A file and the group of its documents; None: a field of each record says it."""

    path: Path
    group: str | None


class Window(NamedTuple):
    """Tokens that are read at once."""

    group: str
    number: int  # in its group
    tokens: list[int]


def name_groups(data: Sequence[Path], named: Sequence[tuple[str, Path]]) -> list[TextFile]:
    """Files with a name, and files that are called by their own.

    Raises:
        ValueError: a file is missing, or two files would share a name that nobody gave.
    """
    files = [TextFile(path, path.name.split(".")[0] or path.name) for path in data]
    names = [file.group for file in files]
    for file in files:
        if names.count(file.group) > 1:
            raise ValueError(
                f"--data {file.path}: another file would be called {file.group!r}, too: name both "
                "with --group NAME=FILE"
            )
    files += [TextFile(path, name) for name, path in named]
    for file in files:
        if not file.path.is_file():
            raise ValueError(f"data {file.path}: no such file")
    return files


def read_windows(
    files: Sequence[TextFile],
    tokenizer: Any,
    length: int,
    *,
    text_key: str = "text",
    source_key: str | None = None,
    separate: bool = False,
    limit: int | None = None,
    on_read: OnRead = lambda _: None,
) -> Iterator[Window]:
    """Windows of all files; what is left of a group at the end is a shorter one.

    Args:
        length: tokens of a window, S.
        text_key: the field or column of the text; not for ``.txt``.
        source_key: the field that names a document's group, instead of the file.
        separate: no window holds two documents; else they follow each other, each ended by the
            tokenizer's end-of-text token, where it has one.
        limit: tokens of a group at most; None: all.
        on_read: called with the bytes that were read since the last call.

    Raises:
        ValueError: a file cannot be read, or holds no text.
    """
    end = [] if separate or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pending: dict[str, list[int]] = {}
    numbers: dict[str, int] = {}
    room: dict[str, int | None] = {}

    def cut(group: str, tokens: list[int]) -> Window:
        number = numbers[group]
        numbers[group] += 1
        return Window(group, number, tokens)

    for file in files:
        has_text = False
        for name, text in _documents(file, text_key, source_key, on_read):
            has_text = has_text or bool(text)
            group = name if name in numbers or len(numbers) < MAX_GROUPS else OTHER
            if group not in numbers:
                numbers[group], room[group], pending[group] = 0, limit, []
            left = room[group]
            if left == 0:
                if source_key is None:
                    break  # the file's only group has enough
                continue
            tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
            if left is not None:
                tokens = tokens[:left]
                room[group] = left - len(tokens)
            pending[group] += tokens
            start = 0
            while len(pending[group]) - start >= length:
                yield cut(group, pending[group][start : start + length])
                start += length
            del pending[group][:start]
            if separate and pending[group]:
                yield cut(group, pending[group])
                pending[group] = []
        if not has_text:
            raise ValueError(f"data {file.path}: it holds no text")
    for group, tokens in pending.items():
        if tokens:
            yield cut(group, tokens)


def in_blocks(windows: Iterable[Window], num_tokens: int) -> Iterator[list[Window]]:
    """Windows that are read together: as many as ``num_tokens`` hold at the longest one's length.

    The size is not for the user to choose: rounding in matrix products depends on how many rows
    they have, and a token close to the threshold on rounding.
    """
    block: list[Window] = []
    longest = 0
    for window in windows:
        longest = max(longest, len(window.tokens))
        if block and longest * (len(block) + 1) > num_tokens:
            yield block
            block, longest = [], len(window.tokens)
        block.append(window)
    if block:
        yield block


def _documents(
    file: TextFile, text_key: str, source_key: str | None, on_read: OnRead
) -> Iterator[tuple[str, str]]:
    """Group and text of each document."""
    if file.path.suffix == ".txt":
        if source_key is not None:
            raise ValueError(
                f"--source-key {source_key}: {file.path} is plain text, without fields: name its "
                "group with --group NAME=FILE"
            )
        for text in _plain_text(file.path, on_read):
            yield file.group or file.path.name, text
        return

    def stop(unreadable: Unreadable) -> None:
        raise unreadable

    keys = [text_key] if source_key is None else [text_key, source_key]
    reader = open_reader(file.path, keys, stop)
    done = 0
    try:
        for texts in reader:
            yield file.group if len(texts) == 1 else texts[1], texts[0]  # type: ignore[misc]
            on_read(reader.position - done)
            done = reader.position
    except ValueError as error:
        for key, flag in ((text_key, "--text-key"), (source_key, "--source-key")):
            if f"no field '{key}'" in str(error):
                raise ValueError(f"{error}: name the right one with {flag}") from error
        raise
    on_read(reader.size - done)


def _plain_text(path: Path, on_read: OnRead) -> Iterator[str]:
    """The whole file, or pieces that end with a line."""
    try:
        with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
            done = 0
            while lines := stream.readlines(TXT_PIECE):
                yield "".join(lines)
                on_read(raw.tell() - done)
                done = raw.tell()
    except UnicodeDecodeError as error:
        raise ValueError(f"data {path}: not valid UTF-8 ({error.reason})") from error
    except OSError as error:
        raise ValueError(f"data {path}: {error.strerror}") from error
