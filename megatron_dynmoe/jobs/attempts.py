"""What the launch scripts do before and after each attempt at a run that stops and resumes.

    dynmoe attempt begin --world-size 16 RECIPE FLAGS ... --run-dir DIR
    dynmoe attempt end DIR/attempts/0001 --status 0

``begin`` checks the flags, adds those that resuming needs, records flags, commit and environment in
the attempt's folder, and prints the folder's path. ``end`` says how the attempt ended and whether
to queue the job again: exactly if the work is not done and another attempt can help. The module
does not import torch, because it runs before the training.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_dynmoe.jobs.preflight import LENGTH_FLAGS, check_run
from megatron_dynmoe.jobs.recipes import recipe_flags
from megatron_dynmoe.runs.folder import ATTEMPTS, FINISHED, STOPPED, TENSORBOARD
from megatron_dynmoe.settings.messages.words import format_flags, values_of, whole_number
from megatron_dynmoe.storage.megatron_names import CHECKPOINTS, TRACKER

# Exit codes. 75 is EX_TEMPFAIL: try again later.
DONE, FAILED, REFUSED, ALREADY_FINISHED, GO_ON = 0, 1, 2, 3, 75

# These flags say how a run starts. A run that resumes from its own checkpoint gets none of them.
_START = (
    *("load", "pretrained-checkpoint", "finetune", "ckpt-step", "no-load-optim", "no-load-rng"),
    *("exit-on-missing-checkpoint", "ckpt-fallback"),
)
_DATA = ("data-path", "train-data-path", "valid-data-path", "test-data-path", "data-args-path")
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_ERROR = re.compile(r"^(\[rank\d+\]: )?[\w.]*(Error|Exception)\b|^([\w.]+: )?error: ")
_REFUSAL = "error: "  # so begins what the training says of a command line that cannot work
_EVENTS_BEFORE = "tensorboard-before"
_PACKAGES = ("megatron-dynmoe", "torch", "megatron-core", "transformer-engine", "apex", "triton")


def begin(recipe: str, flags: Sequence[str], world_size: int, max_restarts: int) -> Path | None:
    """Open the next attempt of a run.

    Args:
        recipe: the recipe's name or path.
        flags: the flags after the recipe's own; ``--run-dir`` is among them.
        world_size: number of processes.
        max_restarts: how often one job may restart from the same iteration.

    Returns:
        The attempt's folder, or None if the run is finished.

    Raises:
        ValueError: the flags cannot work, or the job has started too often without progress.
    """
    words = [*recipe_flags(recipe), *flags]
    values = values_of(words)
    if "mock-data" in values:
        words = _without(words, _DATA)  # drops the cluster's data, which this run does not read
    if not values.get("run-dir"):
        raise ValueError("--run-dir is missing: name the folder in which to keep the run.")
    run_dir = Path(values["run-dir"][0])
    if is_finished(run_dir, values):
        return None
    iteration = latest_iteration(run_dir, values)
    goes_on = iteration is not None or _is_unusable(_tracker(run_dir, values))
    if goes_on:
        words = _without(words, _START)
        words += ["--load", str(_checkpoints(run_dir, values)), "--exit-on-missing-checkpoint"]
        words += ["--ckpt-fallback"]  # nobody is there to choose another checkpoint
    check_run(words, world_size)

    earlier = _attempts(run_dir)
    number = int(earlier[-1].name) + 1 if earlier else 1
    job = os.environ.get("SLURM_JOB_ID")
    _check_progress(earlier, job, iteration, max_restarts)
    attempt = run_dir / ATTEMPTS / f"{number:04d}"
    attempt.mkdir(parents=True)
    if not goes_on and (run_dir / TENSORBOARD).exists():
        # Curves of steps that no checkpoint holds; the run begins anew.
        (run_dir / TENSORBOARD).rename(attempt / _EVENTS_BEFORE)
    (attempt / "flags.txt").write_text(format_flags(words) + "\n")
    _record(attempt, job=job, iteration=iteration, world_size=world_size, began=_now())
    _write_origin(attempt)
    _print_changed_flags(earlier, words)
    start = "from the newest good checkpoint" if goes_on else "from the start"
    if iteration is not None:
        start = f"from iteration {iteration}"
    size = "1 process" if world_size == 1 else f"{world_size} processes"
    print(f"attempt {number} of {run_dir}: {start}, {size}", file=sys.stderr)
    return attempt


def end(attempt: Path, status: int, was_stopped: bool) -> int:
    """Say how an attempt ended.

    Args:
        attempt: the attempt's folder.
        status: the exit status of its processes.
        was_stopped: whether a time limit or a preemption told it to stop.

    Returns:
        :data:`DONE`, :data:`FAILED`, :data:`GO_ON`: another attempt is to follow; or
        :data:`REFUSED`: the flags cannot work, and nothing is left of this attempt.
    """
    run_dir = attempt.parent.parent
    values = values_of(shlex.split((attempt / "flags.txt").read_text()))
    began = _facts(attempt).get("iteration")
    iteration = latest_iteration(run_dir, values)
    # If it is an earlier one than at the beginning, that one was damaged, and was left behind.
    has_progress = iteration is not None and iteration != (began or 0)
    reached = "no checkpoint" if iteration is None else f"checkpoint {iteration}"
    _record(attempt, status=status, ended=_now(), reached=iteration)
    if is_finished(run_dir, values):
        print(f"finished: {run_dir} ({reached})")
        return DONE
    if status == 0 and "exit-interval" in values:
        print(f"stopped at --exit-interval {values['exit-interval'][0]}: {run_dir} ({reached})")
        return DONE
    if status == 0 or was_stopped or (attempt / STOPPED).is_file():
        print(f"stopped before its end: {run_dir} ({reached})")
        return GO_ON
    errors = _errors(attempt)
    refusal = next((error for error in errors.values() if error.startswith(_REFUSAL)), None)
    if status == REFUSED and refusal and not has_progress:
        _undo(attempt)
        print(refusal, file=sys.stderr)
        return REFUSED
    print(f"failed with exit status {status}: {run_dir} ({reached}); logs in {attempt}")
    for log, error in errors.items():
        print(f"  {log}: {error}")
    if has_progress:
        print("it had saved a new checkpoint, so it may go on from there")
        return GO_ON
    print("it had saved no new checkpoint, so trying again would fail again")
    return FAILED


def _undo(attempt: Path) -> None:
    """Take an attempt back that trained nothing and has said why."""
    run_dir = attempt.parent.parent
    if (attempt / _EVENTS_BEFORE).exists() and not (run_dir / TENSORBOARD).exists():
        (attempt / _EVENTS_BEFORE).rename(run_dir / TENSORBOARD)
    shutil.rmtree(attempt)
    with suppress(OSError):  # not empty
        attempt.parent.rmdir()
        run_dir.rmdir()


def latest_iteration(run_dir: Path, values: dict[str, list[str]]) -> int | None:
    """The iteration of the last complete checkpoint, which Megatron notes after each save."""
    tracker = _tracker(run_dir, values)
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    return int(text) if text.isdigit() else None


def is_finished(run_dir: Path, values: dict[str, list[str]]) -> bool:
    """Whether the run has reached its end, and the flags ask for no more than that.

    Raises:
        ValueError: a flag for the run's length is not a whole number.
    """
    marker = run_dir / FINISHED
    if not marker.is_file():
        return False
    done = json.loads(marker.read_text())
    return all(
        whole_number(values, flag, least=0) <= (done[flag] or 0)
        for flag in LENGTH_FLAGS
        if flag in values
    )


def _checkpoints(run_dir: Path, values: dict[str, list[str]]) -> Path:
    return Path("".join(values.get("save", [])) or run_dir / CHECKPOINTS)


def _tracker(run_dir: Path, values: dict[str, list[str]]) -> Path:
    return _checkpoints(run_dir, values) / TRACKER


def _is_unusable(tracker: Path) -> bool:
    """Whether there is a tracker but it is of no use: the checkpoints beside it may be good."""
    if not tracker.is_file():
        return False
    text = tracker.read_text(errors="replace").strip()
    return not text.isdigit() and text != "release"


def _check_progress(
    earlier: Sequence[Path], job: str | None, iteration: int | None, max_restarts: int
) -> None:
    """Refuse another attempt if too many of this job's began at the same iteration."""
    restarts = 0
    for attempt in reversed(earlier):
        facts = _facts(attempt)
        if "job" not in facts:
            continue  # the record does not say whether this job began it
        if job is None or (facts["job"], facts["iteration"]) != (job, iteration):
            break
        restarts += 1
    if restarts > max_restarts:
        place = "the start" if iteration is None else f"iteration {iteration}"
        raise ValueError(
            f"job {job} has started {restarts} times from {place} without a new checkpoint "
            f"(MAX_RESTARTS is {max_restarts}): look into {earlier[-1]}, mend the cause, and "
            "submit again; the count begins anew with a new job."
        )


def _without(words: Sequence[str], names: Iterable[str]) -> list[str]:
    """The words of a command line without some flags and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word[2:].partition("=")[0] in names
        if not dropping:
            kept.append(word)
    return kept


def _attempts(run_dir: Path) -> list[Path]:
    """The folders of all attempts that still exist, in order."""
    folders = [path for path in (run_dir / ATTEMPTS).glob("*") if path.name.isdecimal()]
    return sorted(folders, key=lambda path: int(path.name))


def _facts(attempt: Path) -> dict[str, Any]:
    """The record of an attempt; empty if its start was cut short or files are gone."""
    try:
        facts: dict[str, Any] = json.loads((attempt / "attempt.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return facts


def _record(attempt: Path, **facts: Any) -> None:
    text = json.dumps(_facts(attempt) | facts, indent=2)
    (attempt / "attempt.json").write_text(text + "\n")


def _write_origin(attempt: Path) -> None:
    """Record the commit, local changes, versions and the environment without secrets."""
    checkout = Path(__file__).resolve().parents[2]
    commit = _git(checkout, "rev-parse", "HEAD") or "unknown: not a git checkout\n"
    (attempt / "commit.txt").write_text(commit + _git(checkout, "status", "--short"))
    (attempt / "changes.diff").write_text(_git(checkout, "diff", "HEAD"))
    versions = [f"# Python {sys.version.split()[0]}"]
    for package in _PACKAGES:
        try:
            versions.append(f"# {package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"# {package} is not installed")
    environment = [
        f"{name}={'(left out)' if _SECRET.search(name) else value}"
        for name, value in sorted(os.environ.items())
    ]
    (attempt / "environment.txt").write_text("\n".join([*versions, *environment]) + "\n")


def _git(folder: Path, *command: str) -> str:
    try:
        answer = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def _print_changed_flags(earlier: Sequence[Path], words: Sequence[str]) -> None:
    if not earlier or not (earlier[-1] / "flags.txt").is_file():
        return
    last = shlex.split((earlier[-1] / "flags.txt").read_text())
    old, new = (
        {shlex.join([f"--{name}", *given]) for name, given in values_of(kept).items()}
        for kept in (_without(flags, _START) for flags in (last, words))
    )
    for sign, lines in (("-", old - new), ("+", new - old)):
        for line in sorted(lines):
            print(f"flags since attempt {int(earlier[-1].name)}: {sign} {line}", file=sys.stderr)


def _errors(attempt: Path) -> dict[str, str]:
    """The first error in each log, once, by the log's name.

    The rank that died first comes first, torchrun last. That a child failed, which is all that
    torchrun says then, is left out if the child said why.
    """
    found: dict[str, str] = {}
    # The clock of a file system may tick only every 10 ms. At equal times, the name decides.
    ranks = sorted(attempt.glob("rank-*.log"), key=lambda log: (log.stat().st_mtime_ns, log.name))
    for log in [*ranks, *sorted(attempt.glob("torchrun-*.log"))]:
        lines = log.read_text(errors="replace").splitlines()
        message = next((line for line in lines if _ERROR.match(line)), None)
        if message is not None and not (found and "ChildFailedError" in message):
            found.setdefault(re.sub(r"^\[rank\d+\]: ", "", message), log.name)
    return {log: message for message, log in list(found.items())[:5]}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
