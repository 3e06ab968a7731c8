"""Cuts text files into windows: the tokens that the model reads at once, each with its group.

Windows depend only on the text: the documents of a group follow each other as in training, and are
cut at every full length. Which windows are read together later makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dynmoe.data.text.inputs import expand_inputs, is_plain_text, name_without_endings
from megatron_dynmoe.data.text.readers import open_reader
from megatron_dynmoe.data.text.records import (
    DEFAULT_LIMITS,
    NAME_IT,
    Limits,
    OnUnreadable,
    Unreadable,
)
from megatron_dynmoe.huggingface.encoding import around_document, encode_text

# Groups need memory; further values of a source field are counted together.
MAX_GROUPS = 32
OTHER = "(other)"
# What a source field without a letter is called.
EMPTY = "(empty)"

# How many tokens beyond a limit are encoded, so that the cut in the text changes none before it.
MARGIN = 64

OnRead = Callable[[int], Any]


def stop(unreadable: Unreadable) -> None:
    """Stop at the first record that is not a document."""
    raise unreadable


class TextFile(NamedTuple):
    """A file and the group of its documents; if None, a field of each record names the group."""

    path: Path
    group: str | None


class Reading(NamedTuple):
    """How documents are found in files.

    Attributes:
        text_key: the field or column of the text; not for ``.txt``.
        source_key: the field that names a document's group, instead of the file.
        on_unreadable: called with every record that is not a document; if it returns, the record
            is left out.
        limits: how large records and files may be.
    """

    text_key: str = "text"
    source_key: str | None = None
    on_unreadable: OnUnreadable = stop
    limits: Limits = DEFAULT_LIMITS


_EVERYTHING = Reading()


class Window(NamedTuple):
    """Tokens that the model reads at once."""

    group: str
    number: int  # in its group
    tokens: list[int]
    documents: list[int]  # of each token, numbered in its group


def _own_names(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its own without endings, and as many folders as make it unique."""

    def name(path: Path, num_folders: int) -> str:
        folders = path.absolute().parts[1:-1]
        return "/".join([*folders[len(folders) - num_folders :], name_without_endings(path)])

    names = []
    for path in paths:
        others = [other for other in paths if other is not path]
        depths = range(len(path.absolute().parts))
        unique = (d for d in depths if name(path, d) not in {name(other, d) for other in others})
        depth = next(unique, None)
        # Files of one folder that differ only in their endings keep them.
        names.append(path.name if depth is None else name(path, depth))
    return names


def name_groups(
    data: Sequence[str], named: Sequence[tuple[str, str]], source_key: str | None = None
) -> list[TextFile]:
    """Files of named groups, and files that are groups under their own names.

    Args:
        data: paths, folders or globs; each file is a group.
        named: pairs of a name and a path, folder or glob; the files of a pair are one group.
        source_key: the field that names the groups instead.

    Raises:
        ValueError: a file is missing, or given twice; a folder holds no text.
    """
    paths = expand_inputs(data, "--data")
    files = [
        TextFile(path, None if source_key is not None else name)
        for path, name in zip(paths, _own_names(paths), strict=True)
    ]
    files += [
        TextFile(path, name)
        for name, pattern in named
        for path in expand_inputs([pattern], "--group")
    ]
    seen: dict[Path, Path] = {}
    for path, _ in files:
        first = seen.setdefault(path.resolve(), path)
        if first is not path:
            raise ValueError(f"{path} is the file {first}: its text would count twice")
    return files


def check_text(files: Sequence[TextFile], reading: Reading) -> None:
    """Read each file up to its first text, to find mistakes before a model is loaded.

    Raises:
        ValueError: a file cannot be read, or holds no text.
    """
    for file in files:
        if not any(text for _, text in _documents(file, reading, lambda _: None)):
            raise ValueError(f"data {file.path}: it holds no text")


def read_windows(
    files: Sequence[TextFile],
    tokenizer: Any,
    length: int,
    reading: Reading = _EVERYTHING,
    *,
    separate: bool = False,
    limit: int | None = None,
    on_read: OnRead = lambda _: None,
) -> Iterator[Window]:
    """Windows of all files; the last window of a group may be shorter.

    Args:
        length: tokens of a window, S.
        reading: how documents are found in the files.
        separate: whether no window may hold two documents. Otherwise documents follow each other,
            each with the tokenizer's end-of-text token, if it has one, at its end.
        limit: the most tokens of a group; None: all.
        on_read: called with the bytes that were read since the last call.

    Raises:
        ValueError: a file cannot be read.
    """
    begin, end = around_document(tokenizer)
    if separate:
        end = []
    pending: dict[str, list[int]] = {}
    origins: dict[str, list[int]] = {}  # the documents of what is pending
    documents: dict[str, int] = {}
    numbers: dict[str, int] = {}
    room: dict[str, int | None] = {}

    def cut(group: str, start: int, end: int | None = None) -> Window:
        number = numbers[group]
        numbers[group] += 1
        return Window(group, number, pending[group][start:end], origins[group][start:end])

    for file in files:
        for name, text in _documents(file, reading, on_read):
            group = name if name in numbers or len(numbers) < MAX_GROUPS else OTHER
            if group not in numbers:
                numbers[group], room[group], documents[group] = 0, limit, 0
                pending[group], origins[group] = [], []
            left = room[group]
            if left == 0:
                if reading.source_key is None:
                    break  # the file's only group has enough
                continue
            tokens = begin + _first_tokens(tokenizer, text, left) + end
            if left is not None:
                tokens = tokens[:left]
                room[group] = left - len(tokens)
            pending[group] += tokens
            origins[group] += [documents[group]] * len(tokens)
            documents[group] += bool(tokens)
            start = 0
            while len(pending[group]) - start >= length:
                yield cut(group, start, start + length)
                start += length
            if separate and start < len(pending[group]):
                yield cut(group, start)
                start = len(pending[group])
            del pending[group][:start], origins[group][:start]
    for group, tokens in pending.items():
        if tokens:
            yield cut(group, 0)


def in_blocks(windows: Iterable[Window], num_tokens: int) -> Iterator[list[Window]]:
    """Windows of one group that are read together: as many as hold ``num_tokens``, all padded.

    The user cannot choose the size, and no block holds two groups. Rounding in matrix products
    depends on their number of rows, and the choice of a token close to the threshold on rounding.
    """
    blocks: dict[str, list[Window]] = {}
    for window in windows:
        block = blocks.setdefault(window.group, [])
        longest = max(len(one.tokens) for one in [*block, window])
        if block and longest * (len(block) + 1) > num_tokens:
            yield block
            blocks[window.group] = block = []
        block.append(window)
    yield from (block for block in blocks.values() if block)


def _first_tokens(tokenizer: Any, text: str, most: int | None) -> list[int]:
    """The tokens of a text, or at least its first ``most``, without encoding much more text."""
    num_chars = len(text) if most is None else 8 * (most + MARGIN)
    while True:
        tokens = encode_text(tokenizer, text[:num_chars])
        if num_chars >= len(text) or (most is not None and len(tokens) >= most + MARGIN):
            return tokens
        num_chars *= 2


def _documents(file: TextFile, reading: Reading, on_read: OnRead) -> Iterator[tuple[str, str]]:
    """Group and text of each document."""
    text_key, source_key = reading.text_key, reading.source_key
    if source_key is not None and is_plain_text(file.path):
        raise ValueError(
            f"--source-key {source_key}: {file.path} is plain text, without fields: name its "
            "group with --group NAME=FILE"
        )
    keys = [text_key] if source_key is None else [text_key, source_key]
    reader = open_reader(file.path, keys, reading.on_unreadable, reading.limits)
    done = 0
    try:
        for texts in reader:
            yield file.group if len(texts) == 1 else texts[1] or EMPTY, texts[0]  # type: ignore[misc]
            on_read(reader.position - done)
            done = reader.position
    except ValueError as error:
        reason = str(error)
        if f"no field '{source_key}'" in reason or f"no column '{source_key}'" in reason:
            reason = reason.replace(NAME_IT, "name the one with the group by --source-key")
        if isinstance(error, Unreadable):
            reason += " (--on-error skip leaves such records out)"
        raise ValueError(reason) from error
    on_read(reader.size - done)
