"""``dynmoe tokenizer``: trains a SentencePiece tokenizer on text."""

import shlex
from collections.abc import Sequence

from megatron_dynmoe.cli.reading import add_input_flags
from megatron_dynmoe.data.text.records import Limits
from megatron_dynmoe.settings.messages.command_line import CommandParser, ending_plainly, number


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    parser = CommandParser(
        description="Train a SentencePiece BPE tokenizer on text: JSON lines, .txt or Parquet.",
        example="dynmoe tokenizer --input text.jsonl --vocab-size 4096 --output mine/tokenizer",
    )
    add_input_flags(parser)
    parser.add_argument(
        "--vocab-size",
        type=number(int, 1),
        required=True,
        help="number of pieces, including the 259 fixed ones",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.model")
    args = parser.parse_args(argv)

    with ending_plainly(parser.prog):
        from megatron_dynmoe.data.train_tokenizer import train_tokenizer

        model = train_tokenizer(
            args.input,
            args.output,
            args.vocab_size,
            json_keys=args.json_keys,
            skip_unreadable=args.on_error == "skip",
            limits=Limits(args.max_line_bytes, args.max_expansion),
            overwrite=args.overwrite,
        )
        flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
        print(f"written: {model} ({args.vocab_size:,} pieces)\nto use it: {shlex.join(flags)}")
