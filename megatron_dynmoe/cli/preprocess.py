"""``dynmoe preprocess``: encodes text into Megatron's token files."""

import argparse
import os
import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_dynmoe.cli.reading import add_input_flags
from megatron_dynmoe.data.text.records import Limits
from megatron_dynmoe.data.tokenizer import TOKENIZER_TYPES
from megatron_dynmoe.settings.messages.command_line import (
    CommandParser,
    ending_plainly,
    number,
)

_NO_SPLIT = "sentences are not split here: each document is one sequence"
_PADDING = "the size of the model's vocabulary is the training job's matter: leave it out"
_FOLDER = "give the tokenizer's folder or model file with --tokenizer-model"
_SPACES = "use a SentencePiece model that was trained to keep spaces"
_THREADS = "one run reads all inputs and --workers threads encode: leave it out"

# These flags of Megatron-LM's tools/preprocess_data.py have no meaning here; the text says why.
REFUSED_FLAGS = {
    "--split-sentences": _NO_SPLIT,
    "--keep-newlines": _NO_SPLIT,
    "--lang": _NO_SPLIT,
    "--find-optimal-num-workers": _THREADS,
    "--workers-to-check": _THREADS,
    "--max-documents": _THREADS,
    "--vocab-size": _PADDING,
    "--padded-vocab-size": _PADDING,
    "--no-pad-vocab-size": _PADDING,
    "--disable-pad-vocab-size": _PADDING,
    "--vocab-extra-ids": _PADDING,
    "--vocab-file": _FOLDER,
    "--merge-file": _FOLDER,
    "--tokenizer-metadata": _FOLDER,
    "--tokenizer-special-tokens": "special tokens belong into the tokenizer's own files",
    "--tokenizer-sentencepiece-legacy": "special tokens belong into the tokenizer's own files",
    "--no-tokenizer-sentencepiece-ignore-extra-whitespaces": _SPACES,
    "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces": _SPACES,
    "--tokenizer-hf-no-use-fast": "only fast (Rust) tokenizers are used",
    "--trust-remote-code": "code from a tokenizer's folder is never run",
    "--tiktoken-pattern": "TikTokenizer is not supported",
    "--tiktoken-num-special-tokens": "TikTokenizer is not supported",
    "--null-tokenizer-eod-id": "NullTokenizer is not supported",
    "--null-tokenizer-pad-id": "NullTokenizer is not supported",
    "--chat-template": "documents are plain text",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Encode as the command line says."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.partitions != 1:
        parser.error(f"argument --partitions: {_THREADS}, or give 1")

    with ending_plainly(parser.prog):
        from megatron_dynmoe.data.preprocess import preprocess
        from megatron_dynmoe.data.tokenizer import build_tokenizer

        tokenizer = build_tokenizer(
            args.tokenizer_type,
            args.tokenizer_model,
            include_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
        )
        summary = preprocess(
            args.input,
            args.output_prefix,
            tokenizer,
            json_keys=args.json_keys,
            append_eod=args.append_eod,
            workers=args.workers,
            skip_unreadable=args.on_error == "skip",
            limits=Limits(args.max_line_bytes, args.max_expansion),
            overwrite=args.overwrite,
            log_interval=args.log_interval,
        )
        print(f"{summary}\n{_usage(args, summary.prefixes)}")


def _usage(args: argparse.Namespace, prefixes: Sequence[str]) -> str:
    """Say what was written, and by which flags training reads it."""
    data = prefixes if len(prefixes) == 1 else [word for name in prefixes for word in ("1", name)]
    words = ["--data-path", *data, "--tokenizer-type", args.tokenizer_type]
    words += ["--tokenizer-model", args.tokenizer_model]
    if args.tokenizer_hf_no_include_special_tokens:
        words.append("--tokenizer-hf-no-include-special-tokens")
    files = ", ".join(f"{prefix}.bin and .idx" for prefix in prefixes)
    return f"written: {files}\nto train on it: {shlex.join(words)}"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        description="Encode JSON lines, .txt or Parquet to Megatron's PREFIX_KEY_document files.",
        example="dynmoe preprocess --input text.jsonl --output-prefix mine/text --append-eod "
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model mine/tokenizer.model",
    )
    add_input_flags(parser)
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    group.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="the SentencePiece .model file, or a Hugging Face folder or tokenizer.json",
    )
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="without the tokens that a Hugging Face tokenizer puts around each text",
    )
    group.add_argument(
        "--append-eod", action="store_true", help="end each document with the eos token"
    )
    group = parser.add_argument_group("output and runtime")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX")
    group.add_argument(
        "--workers",
        type=number(int, 1),
        default=len(os.sched_getaffinity(0)),
        help="threads that encode (default: the processors of this process, %(default)s)",
    )
    group.add_argument(
        "--log-interval",
        type=number(int, 1),
        metavar="DOCUMENTS",
        help="documents between progress lines if stderr is no terminal (default: 30 seconds)",
    )
    # This tool always writes one partition in the order of the input.
    group.add_argument("--partitions", type=int, default=1, help=argparse.SUPPRESS)
    group.add_argument("--keep-sequential-samples", action="store_true", help=argparse.SUPPRESS)
    for flag, reason in REFUSED_FLAGS.items():
        parser.add_argument(flag, nargs="*", action=_Refuse, reason=reason, help=argparse.SUPPRESS)
    return parser


class _Refuse(argparse.Action):
    def __init__(self, *args: Any, reason: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reason = reason

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]} is not supported: {self._reason}")
