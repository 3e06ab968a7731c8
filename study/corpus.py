"""Makes a tokenizer, token files and a held-out part of the text, once for all runs."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_dynmoe.data.indexed import token_dtype
from megatron_dynmoe.data.text.inputs import expand_inputs, name_without_endings
from megatron_dynmoe.data.text.readers import open_reader
from megatron_dynmoe.data.text.records import Unreadable
from megatron_dynmoe.storage.atomic import new_folder
from study.fingerprint import ROOT, of_files

EXAMPLES = ROOT / "examples" / "data"
HELD_OUT = 0.05  # share of each file's documents, taken from its end
_SUFFIX = ".jsonl.gz"


class Corpus(NamedTuple):
    """The study's text; a *kind* is one of its files, by name."""

    fingerprint: str
    kinds: list[str]
    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.model"

    def held_out(self, kind: str) -> Path:
        """The documents of a kind on which no run trains."""
        return self.folder / f"{kind}-held-out{_SUFFIX}"

    def flags(self) -> list[str]:
        """Megatron's flags for this data."""

        def blend(part: str) -> list[str]:
            """Each file with its size as its weight. Megatron reads one without a weight once."""
            prefixes = [self.folder / f"{kind}-{part}_text_document" for kind in self.kinds]
            sizes = [prefix.with_name(prefix.name + ".bin").stat().st_size for prefix in prefixes]
            return [str(item) for pair in zip(sizes, prefixes, strict=True) for item in pair]

        return [
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(self.tokenizer)),
            *("--train-data-path", *blend("training")),
            *("--valid-data-path", *blend("held-out")),
            *("--data-cache-path", str(self.folder / "cache")),
        ]


def files_of(texts: Sequence[str] | None) -> list[Path]:
    """The text files: the given ones, or the examples that come with the project.

    Raises:
        ValueError: a file is missing or is not text, or two have the same name.
    """
    files = expand_inputs(texts or [str(EXAMPLES / f"*{_SUFFIX}")], "--text")
    if len({name_without_endings(file) for file in files}) < len(files):
        raise ValueError("--text: two files have the same name, which names them in the results.")
    return files


def corpus_of(files: Sequence[Path], vocab_size: int, runs: Path) -> Corpus:
    """The folder of the corpus of these files, which may not exist yet."""
    fingerprint = f"{of_files(files)}-{vocab_size}"
    kinds = [name_without_endings(file) for file in files]
    return Corpus(fingerprint, kinds, runs / f"corpus-{fingerprint}")


def prepare(corpus: Corpus, files: Sequence[Path], vocab_size: int, sequence_length: int) -> None:
    """Make the corpus if it does not exist yet; its folder appears when it is complete.

    Raises:
        ValueError: a file is too short to hold out a part of it.
        subprocess.CalledProcessError: a tool failed, and said why.
    """
    if corpus.folder.is_dir():
        return
    with new_folder(corpus.folder, overwrite=False) as partial:
        for kind, file in zip(corpus.kinds, files, strict=True):
            _split(
                file, partial / f"{kind}-training{_SUFFIX}", partial / f"{kind}-held-out{_SUFFIX}"
            )
        trained_on = [str(partial / f"{kind}-training{_SUFFIX}") for kind in corpus.kinds]
        _tool(
            "train_tokenizer.py",
            *("--input", *trained_on, "--vocab-size", str(vocab_size)),
            *("--output", str(partial / "tokenizer")),
        )
        for file in sorted(partial.glob(f"*{_SUFFIX}")):
            _tool(
                "preprocess_data.py",
                *(
                    "--input",
                    str(file),
                    "--append-eod",
                    "--tokenizer-type",
                    "SentencePieceTokenizer",
                ),
                *("--tokenizer-model", str(partial / "tokenizer.model")),
                *("--output-prefix", str(file).removesuffix(_SUFFIX)),
            )
        for kind, file in zip(corpus.kinds, files, strict=True):
            tokens = partial / f"{kind}-held-out_text_document.bin"
            num_tokens = tokens.stat().st_size // token_dtype(vocab_size).itemsize
            if num_tokens < sequence_length:
                raise ValueError(
                    f"--text {file}: {num_tokens} tokens at its end are held out, and a sequence "
                    f"has {sequence_length}; give more documents."
                )


def _split(file: Path, training: Path, held_out: Path) -> None:
    num_documents = sum(1 for _ in _documents(file))
    num_held_out = math.ceil(HELD_OUT * num_documents)
    if num_documents < 2:
        raise ValueError(f"--text {file}: one document cannot be split; give at least two.")
    with (
        gzip.open(training, "wt", encoding="utf-8", compresslevel=1) as first,
        gzip.open(held_out, "wt", encoding="utf-8", compresslevel=1) as last,
    ):
        for number, text in enumerate(_documents(file)):
            target = first if number < num_documents - num_held_out else last
            target.write(json.dumps({"text": text}) + "\n")


def _documents(file: Path) -> Iterator[str]:
    def stop(unreadable: Unreadable) -> None:
        raise unreadable

    return (text for (text,) in open_reader(file, ["text"], stop))


def _tool(name: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
