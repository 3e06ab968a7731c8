"""Trains a SentencePiece BPE model on the inputs that `preprocess` reads."""

import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_dynmoe.data.text.inputs import expand_inputs
from megatron_dynmoe.data.text.readers import open_reader
from megatron_dynmoe.data.text.records import DEFAULT_LIMITS, Limits, OnUnreadable, Unreadable
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.messages.outputs import check_absent, check_parent
from megatron_dynmoe.storage.atomic import replace_file

# These are <unk>, <s>, </s> and one piece for each byte.
FIXED_PIECES = 259


# A line is passed in pieces of this many characters. At 4 bytes each at most, they stay within
# 1 MiB: the trainer passes over longer lines.
PIECE_CHARACTERS = 1 << 18
# The trainer passes over lines with these characters: it uses the first one as its own mark.
_UNUSABLE = re.compile("[\u2585\0]")


def train_tokenizer(
    inputs: Sequence[str],
    output_prefix: str,
    vocab_size: int,
    *,
    json_keys: Sequence[str] = ("text",),
    skip_unreadable: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    overwrite: bool = False,
) -> Path:
    """Train a byte-fallback BPE model like Llama's: `<unk>`, `<s>`, `</s>` are ids 0, 1, 2.

    Digits are single pieces. Runs of spaces are kept and may be pieces. Characters outside the
    vocabulary, including line breaks, become their bytes. No space is put before a text, so that
    decoding gives back exactly the text that was encoded. The same inputs give the same model.

    Args:
        inputs, json_keys, skip_unreadable, limits: as in `preprocess`.
        vocab_size: number of pieces in all, above `FIXED_PIECES`.

    Returns:
        The model's path, PREFIX.model.

    Raises:
        UsageError: what is asked for cannot be: files that are not there, too little text for
            `vocab_size`, an output that exists.
        ValueError: a file cannot be read.
        Unreadable: a record is no document, unless skipped.
        OSError: the output cannot be written.
    """
    from sentencepiece import SentencePieceTrainer

    paths = expand_inputs(inputs)
    target = Path(f"{output_prefix}.model")
    check_parent(output_prefix)
    check_absent(target, overwrite)
    if vocab_size <= FIXED_PIECES:
        raise UsageError(
            f"--vocab-size is {vocab_size}: give more than {FIXED_PIECES}, which are the bytes and "
            "three marks, and 1000 or more for a text worth training on"
        )

    lines = _Lines(paths, json_keys, skip_unreadable, limits)
    model = io.BytesIO()  # not a file, because its name would become part of the model
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            character_coverage=0.9995,
            max_sentence_length=4 * PIECE_CHARACTERS,  # bytes
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        if not lines.count:
            raise ValueError(f"no text in {', '.join(map(str, paths))}") from error
        reason = str(error).rpartition("] ")[2]  # without the trainer's source line and condition
        remedy = "give more text or a smaller size"
        if "smaller than required_chars" in reason:  # every letter of the text needs a piece
            remedy = "give a larger size"
        raise UsageError(
            f"--vocab-size is {vocab_size}, which this text ({lines.count:,} lines) cannot give: "
            f"{remedy} ({reason})"
        ) from error
    if lines.num_cut:
        print(
            f"note: {lines.num_cut:,} lines were cut for the trainer, which takes none longer than "
            f"{PIECE_CHARACTERS:,} characters or with U+2585 or NUL",
            file=sys.stderr,
        )
    replace_file(target, lambda partial: partial.write_bytes(model.getvalue()))
    return target


class _Lines:
    """The documents' lines without their ends; keeps an error that the trainer would swallow."""

    def __init__(
        self, paths: Sequence[Path], keys: Sequence[str], skip_unreadable: bool, limits: Limits
    ) -> None:
        self.count = self.num_cut = 0
        self.error: Exception | None = None
        self._paths, self._keys, self._skip_unreadable = paths, keys, skip_unreadable
        self._limits = limits

    def __iter__(self) -> Iterator[str]:
        try:
            for path in self._paths:
                for texts in open_reader(path, self._keys, self._policy, self._limits):
                    for text in texts:
                        for line in text.split("\n"):
                            for piece in self._pieces(line):
                                self.count += 1
                                yield piece
        except Exception as error:
            self.error = error
            raise

    def _pieces(self, line: str) -> Iterator[str]:
        """Split a line into parts that the trainer reads: short and without its own marks."""
        if len(line) <= PIECE_CHARACTERS and not _UNUSABLE.search(line):
            yield from [line] * bool(line)
            return
        self.num_cut += 1
        for part in _UNUSABLE.split(line):
            while len(part) > PIECE_CHARACTERS:
                end = part.rfind(" ", 1, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS
                yield part[:end]
                part = part[end:]
            yield from [part] * bool(part)

    @property
    def _policy(self) -> OnUnreadable:
        def on_unreadable(error: Unreadable) -> None:
            if not self._skip_unreadable:
                raise error

        return on_unreadable
