"""``dynmoe convert``: converts checkpoints to Hugging Face and back."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_dynmoe.conversion.formats import FORMATS, OURS
from megatron_dynmoe.settings.config import SETTINGS, DynMoEConfig
from megatron_dynmoe.settings.messages.command_line import (
    CommandParser,
    UsageError,
    ending_plainly,
    number,
)

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
UPCYCLE = "upcycle"  # how the flags of upcycling begin
_M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    _return_freed_memory()
    with ending_plainly(parser.prog):
        return _to_hf(args) if args.command == "to-hf" else _from_hf(args)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        description="Convert checkpoints between Megatron and Hugging Face, in one process and "
        "without a GPU. docs/huggingface.md says what each format can express.",
        example="dynmoe convert to-hf --load runs/quickstart/checkpoints --output my-model",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    to_hf = commands.add_parser(
        "to-hf",
        help="a Megatron checkpoint to a Hugging Face folder",
        example="dynmoe convert to-hf --load runs/quickstart/checkpoints --output my-model",
    )
    to_hf.add_argument(
        "--load",
        type=Path,
        required=True,
        metavar="CKPT",
        help="what --save named in training; or a Hugging Face folder of another format",
    )
    to_hf.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    to_hf.add_argument(
        "--iteration", type=int, metavar="N", help="which checkpoint (default: the latest)"
    )
    to_hf.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default=OURS.name,
        help="; ".join(f"{format.name}: {format.summary}" for format in FORMATS.values())
        + " (default: %(default)s)",
    )
    to_hf.add_argument(
        "--dtype", choices=tuple(_DTYPES), help="type of the weights (default: as trained)"
    )
    to_hf.add_argument(
        "--max-shard-size",
        type=_size,
        default="4GB",
        metavar="SIZE",
        help="largest file of weights, such as 500MB (default: %(default)s)",
    )
    to_hf.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="SentencePiece model or Hugging Face folder (default: what the training used)",
    )

    from_hf = commands.add_parser(
        "from-hf",
        help="a Hugging Face folder to a Megatron checkpoint",
        example="dynmoe convert from-hf --model my-model --save runs/more/checkpoints",
    )
    from_hf.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="folder of any of the formats"
    )
    from_hf.add_argument(
        "--save", type=Path, required=True, metavar="CKPT", help="a new folder, for --load"
    )
    from_hf.add_argument(
        "--hybrid",
        action="store_true",
        help="for a training with --hybrid-layer-pattern (docs/backends.md)",
    )
    routing = from_hf.add_argument_group(
        "routing", "train on with another routing; its settings are those of docs/configuration.md"
    )
    for name, setting in SETTINGS.items():
        routing.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="|".join(setting.choices) or setting.kind.upper(),
            help=setting.help.replace("%", "%%"),
        )
    upcycling = from_hf.add_argument_group(
        "upcycling", "make experts of a dense model's MLPs; the first step computes the same"
    )
    for flag, kind, what in (
        ("experts", number(int, 2), "experts of each layer"),
        (
            "granularity",
            number(int, 1),
            "parts that each copy is cut into; top-k only (default: 1)",
        ),
        (
            "topk",
            number(int, 1),
            "experts of a token with top-k (default: the parts of a copy, or 2)",
        ),
        ("noise", number(float, 0), "noise on the copies, relative to the weights (default: none)"),
        ("seed", number(int, 0, 2**32), "of router and noise (default: 0)"),
    ):
        upcycling.add_argument(f"--{UPCYCLE}-{flag}", type=kind, metavar="N", help=what)
    for command in (to_hf, from_hf):
        command.add_argument("--overwrite", action="store_true", help="replace what is there")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _to_hf(args: argparse.Namespace) -> int:
    from megatron_dynmoe.conversion.convert import Target, to_hf

    target = Target(
        args.output,
        format=args.format,
        dtype=_DTYPES.get(args.dtype),
        max_shard_size=args.max_shard_size,
        tokenizer=args.tokenizer,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    to_hf(args.load, target, args.iteration)
    weights = [file.stat().st_size for file in args.output.glob("*.safetensors")]
    print(
        f"{args.output}: format {args.format}, {sum(weights) / 1e6:,.1f} MB of weights in "
        f"{len(weights)} file{'s' if len(weights) > 1 else ''}"
    )
    return 0


def _from_hf(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if given and "routing" not in given:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} needs --routing")
    try:
        routing = DynMoEConfig.from_dict(given, source="the command line") if given else None
    except ValueError as error:
        raise UsageError(str(error)) from error
    from megatron_dynmoe.conversion.convert import FLAGS, from_hf
    from megatron_dynmoe.conversion.upcycle import Upcycling

    upcycling = {name: getattr(args, f"{UPCYCLE}_{name}") for name in Upcycling._fields}
    upcycling = {name: value for name, value in upcycling.items() if value is not None}
    if upcycling and "experts" not in upcycling:
        raise UsageError(f"--{UPCYCLE}-{next(iter(upcycling))} needs --{UPCYCLE}-experts")
    from_hf(
        args.model,
        args.save,
        routing=routing,
        upcycling=Upcycling(**upcycling) if upcycling else None,
        has_pattern=args.hybrid,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    print(f"{args.save}: train on with the flags in {args.save / FLAGS}:")
    words = shlex.join([f"@{args.save / FLAGS}", "--load", str(args.save)])
    print(f"  python -m megatron_dynmoe.pretrain {words} --exit-on-missing-checkpoint ...")
    return 0


def _return_freed_memory() -> None:
    """Let malloc map large tensors one by one, so that freed memory goes back to the system.

    On the heap, holes between tensors would stay with this process: a shard of 4 GB in small
    tensors took 5.6 GB. Only glibc has this setting.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 4GB or 500MB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is too small")
    return size
