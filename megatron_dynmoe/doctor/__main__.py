"""The command line of the doctor."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from megatron_dynmoe.data import check as data
from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check, guarded
from megatron_dynmoe.doctor import machine, software
from megatron_dynmoe.doctor.table import write_table
from megatron_dynmoe.jobs.recipes import recipe_flags
from megatron_dynmoe.settings.messages.command_line import CommandParser, ending_plainly


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Check and report; exit with 0 (nothing failed), 1 (something failed) or 2 (usage)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.recipe is not None:
        try:
            recipe_flags(args.recipe)
        except ValueError as error:
            parser.error(f"--recipe: {error}")
    if args.checkpoint is not None and (others := _others(parser, args)):
        parser.error(f"--checkpoint looks at nothing else: leave out {', '.join(others)}.")
    with ending_plainly(parser.prog, "not everything was looked at"):
        if args.checkpoint is not None:
            checks = _checkpoint_checks(args)
        else:
            checks = software.look(args.timeout)
            checks += _machine_checks(args)
            checks += _data_checks(args)
        _report(checks, as_json=args.json)
    sys.exit(int(any(check.state == FAILED for check in checks)))


def _report(checks: list[Check], as_json: bool) -> None:
    if as_json:
        counts = {
            name: sum(check.state == state for check in checks)
            for name, state in (("passed", PASSED), ("warnings", WARNING), ("failed", FAILED))
        }
        print(json.dumps({"checks": [check._asdict() for check in checks]} | counts, indent=2))
    else:
        write_table(checks, sys.stdout)
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m megatron_dynmoe.doctor",
        description="Is this machine ready to train? Looks at software, GPUs, data and disk.",
        epilog="Exit code: 0 passed, warnings included; 1 something failed; 2 usage.",
        example="dynmoe doctor --recipe dtop_p_16e",
    )
    parser.add_argument(
        "--data-path",
        nargs="+",
        action="extend",
        default=[],
        metavar="PREFIX",
        help="token files without .bin and .idx, as for training; weights between them are skipped",
    )
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument("--tokenizer-model", metavar="PATH", help="to compare with the data")
    vocabulary.add_argument(
        "--vocab-size", type=int, metavar="N", help="instead of a tokenizer: all ids are below N"
    )
    parser.add_argument("--tokenizer-type", metavar="TYPE", help="guessed from the path")
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder for checkpoints")
    parser.add_argument("--data-cache-path", type=Path, metavar="DIR")
    parser.add_argument(
        "--recipe", metavar="NAME", help="compare the disk with the checkpoints of this run"
    )
    parser.add_argument(
        "--timeout", type=float, default=180, metavar="SECONDS", help="for imports and GPUs (180)"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="look into this checkpoint or exported model only, for what no loading notices",
    )
    parser.add_argument("--json", action="store_true", help="for scripts")
    return parser


def _others(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The flags besides --checkpoint and --json that were given."""
    return [
        action.option_strings[0]
        for action in parser._actions
        if action.dest not in ("help", "checkpoint", "json")
        and getattr(args, action.dest) != action.default
    ]


def _checkpoint_checks(args: argparse.Namespace) -> list[Check]:
    from megatron_dynmoe.doctor.checkpoint.look import look

    return look(args.checkpoint, shows_progress=sys.stderr.isatty())


def _machine_checks(args: argparse.Namespace) -> list[Check]:
    folders = {"temporary files": Path(tempfile.gettempdir())}
    if args.save is not None:
        folders["--save"] = args.save
    if args.data_cache_path is not None:
        folders["--data-cache-path"] = args.data_cache_path
    checks = [
        guarded(name, partial(machine.check_writable, name, folder))
        for name, folder in folders.items()
    ]
    return [
        *checks,
        guarded("disk space", partial(_space, args)),
        guarded("shared memory", machine.check_shared_memory),
        guarded("Slurm", machine.check_slurm),
        guarded("launcher", machine.check_launcher),
        guarded("host name", machine.check_host_name),
    ]


def _space(args: argparse.Namespace) -> Check:
    folder = args.save or Path.cwd()
    if args.recipe is None:
        return machine.check_space(folder, None, None)
    from megatron_dynmoe.jobs.plan import checkpoints

    return machine.check_space(folder, *checkpoints(args.recipe, []))


def _data_checks(args: argparse.Namespace) -> list[Check]:
    checks, vocabulary = [], None
    if args.tokenizer_model is not None:
        check, vocabulary = data.check_tokenizer(args.tokenizer_type, args.tokenizer_model)
        checks.append(check)
    elif args.vocab_size is not None:
        vocabulary = data.Vocabulary(args.vocab_size, None, "--vocab-size")
    return checks + [
        guarded("data", partial(data.check_dataset, prefix, vocabulary))
        for prefix in data.prefixes(args.data_path)
    ]


if __name__ == "__main__":
    main()
