"""``--run-dir``: one folder for everything that a run writes and for the command that began it."""

from __future__ import annotations

import os
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from operator import methodcaller
from pathlib import Path
from typing import Any

from megatron.training.global_vars import get_tensorboard_writer

from megatron_dynmoe.model.settled import Settled
from megatron_dynmoe.runs import folder as names
from megatron_dynmoe.runs.drawing.live_plot import redrawing
from megatron_dynmoe.runs.events import NothingLogged, read_scalars
from megatron_dynmoe.runs.folder import mark_finished
from megatron_dynmoe.runs.summary import write_summary_and_curves
from megatron_dynmoe.settings.messages.refusals import FlagError
from megatron_dynmoe.storage.atomic import replace_file
from megatron_dynmoe.storage.megatron_names import CHECKPOINTS, TRACKER

COMMAND = "command.txt"


def add_flag(parser: ArgumentParser) -> ArgumentParser:
    """Add ``--run-dir`` and ``--live-plot``."""
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="Keep everything of this run in this folder: checkpoints (--save), TensorBoard events "
        "(--tensorboard-dir), the command, the resolved settings and, at the end, summary.json "
        "and curves.png. Paths that have flags of their own stay as given.",
    )
    parser.add_argument(
        "--live-plot",
        action="store_true",
        help="Redraw the curves.png of --run-dir while the run is under way, in a separate "
        "process with low priority.",
    )
    return parser


def set_paths(args: Namespace) -> None:
    """Derive Megatron's paths from ``--run-dir``, before its arguments are validated.

    Raises:
        ValueError: the folder holds another run, which this one would mix with or overwrite; or
            another flag needs a run folder and none is given.
    """
    if args.run_dir is None:
        if args.live_plot:
            raise ValueError("--live-plot draws into the folder of a run: give --run-dir, too.")
        return
    run_dir = Path(args.run_dir)
    # Only the rank that writes events asks, before it writes: other ranks could see its new file.
    if args.rank == args.world_size - 1 and args.load is None:
        has_checkpoint = (run_dir / CHECKPOINTS / TRACKER).is_file()
        if has_checkpoint or _has_logged(run_dir):
            remedy = "or name another folder" if has_checkpoint else "name another folder"
            checkpoints = shlex.quote(str(run_dir / CHECKPOINTS))
            go_on = f"go on with it by --load {checkpoints}, "
            problem = "" if has_checkpoint else " that has saved no checkpoint"
            raise FlagError(
                "run_dir",
                args.run_dir,
                f", which holds a run{problem}",
                f"{go_on * has_checkpoint}{remedy}",
            )
    args.save = args.save or str(run_dir / CHECKPOINTS)
    if args.save_interval is None:
        # Megatron wants an interval with --save, although it always saves at the end.
        args.save_interval = args.train_iters or 1000
    args.tensorboard_dir = args.tensorboard_dir or str(run_dir / names.TENSORBOARD)


def _has_logged(run_dir: Path) -> bool:
    """Whether a run has logged a step there; a run that was refused has logged none."""
    try:
        return bool(read_scalars(run_dir))
    except NothingLogged:
        return False


@contextmanager
def cleaning_up_failed_starts() -> Iterator[None]:
    """If no step ran, remove the event file that Megatron opens first, and empty folders.

    A start may be refused, or fail while it builds the model, indexes data or loads a checkpoint.
    What it leaves must not stand in the way of the corrected command.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        writer = get_tensorboard_writer()
        if writer is not None:
            writer.close()
            folder = Path(writer.log_dir)
            for path in folder.glob(f"{names.EVENT_FILES}.{os.getpid()}.*"):
                if not names.has_scalars(path):
                    path.unlink(missing_ok=True)
            _remove_empty(folder, folder.parent / CHECKPOINTS, folder.parent)
        raise


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def recording(
    args: Namespace,
    settled: Settled,
    program_start: float,
    module: str = "megatron_dynmoe.pretrain",
) -> Iterator[None]:
    """Write into ``--run-dir``, if given, what the run is and, at its end, what it did.

    Args:
        args: Megatron's arguments.
        settled: the run's settings.
        program_start: seconds since the epoch.
        module: what ``python -m`` calls.
    """
    if args.run_dir is None:
        yield
        return
    run_dir = Path(args.run_dir)
    before = _write_settings(run_dir, args, settled, module) if args.rank == 0 else {}
    plotting = args.live_plot and args.rank == args.world_size - 1  # the rank that writes events
    try:
        with redrawing(run_dir, get_tensorboard_writer) if plotting else nullcontext():
            yield
    except SystemExit:  # --exit-interval and similar flags end the process from within the loop
        _write_report(run_dir, args, program_start)
        raise
    except Exception:
        if before and not hasattr(args, "curr_iteration"):  # which Megatron sets at the first step
            _put_back(run_dir, before)
        raise
    _write_report(run_dir, args, program_start)
    if args.rank == 0 and not args.skip_train:  # an evaluation does not finish a run
        mark_finished(run_dir, args.train_iters, args.train_samples)


def _write_settings(
    run_dir: Path, args: Namespace, settled: Settled, module: str
) -> dict[str, bytes | None]:
    """Write the command and the settings; return what the two files held before, None if new."""
    written = (COMMAND, names.RESOLVED)
    before = {
        name: (run_dir / name).read_bytes() if (run_dir / name).is_file() else None
        for name in written
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    command = shlex.join([*launcher, "-m", module, *sys.argv[1:]])
    with open(run_dir / COMMAND, "a") as file:  # a resumed run appends its own command
        file.write(command + "\n")
    settings = {
        **settled.to_dict(),
        "megatron": {name: _plain(value) for name, value in sorted(vars(args).items())},
    }
    import yaml  # a benchmark on a bare machine imports this module and has no such folder

    (run_dir / names.RESOLVED).write_text(yaml.safe_dump(settings, sort_keys=False))
    return before


def _put_back(run_dir: Path, before: dict[str, bytes | None]) -> None:
    """Restore the files of the last start that trained, if there was one."""
    for name, content in before.items():
        path = run_dir / name
        if content is None:
            path.unlink(missing_ok=True)
        else:
            replace_file(path, methodcaller("write_bytes", content))
    _remove_empty(run_dir)


def _write_report(run_dir: Path, args: Namespace, program_start: float) -> None:
    writer = get_tensorboard_writer()  # only the last rank has one
    if args.rank == args.world_size - 1 and writer is not None:
        writer.flush()
        try:
            write_summary_and_curves(run_dir, wall_seconds=time.time() - program_start)
        except NothingLogged as error:  # --tensorboard-log-interval may exceed the run
            print(f"> no {names.SUMMARY} and {names.CURVES}: {error}", flush=True)


def _plain(value: Any) -> Any:
    """Return the value if YAML can hold it, else its name as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    # The check is for exact types: an IntEnum is an int, and YAML cannot hold it.
    return value if type(value) in (bool, int, float, str, type(None)) else str(value)
