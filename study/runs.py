"""One training: its folder, what it depends on, how far it is, and the process that trains it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dynmoe.runs.folder import FINISHED
from megatron_dynmoe.storage.megatron_names import CHECKPOINTS, TRACKER
from study import fingerprint
from study.corpus import Corpus
from study.variants import VARIANTS, Size, Variant, training_flags

KEY = "study.json"
COMMIT = "commit.txt"
LOG, ERRORS, TIMES = "log.txt", "errors.txt", "times.csv"
HELD_OUT = "held_out.json"  # what was measured of the trained model on held-out text


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        key: what the result depends on; two runs with the same key are the same.
        folder: its ``--run-dir``, named by the key.
        size: what is trained, with the steps of this variant.
    """

    variant: Variant
    seed: int
    key: dict[str, Any]
    folder: Path
    size: Size

    @property
    def name(self) -> str:
        return f"{self.variant.name}-seed{self.seed}"

    @property
    def is_finished(self) -> bool:
        return (self.folder / FINISHED).is_file()

    @property
    def iteration(self) -> int:
        """The iteration of the last checkpoint; 0 if there is none."""
        try:
            latest = self.folder / CHECKPOINTS / TRACKER
            return int(latest.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    @property
    def commit(self) -> str:
        """The commit that was checked out when the run began."""
        return (self.folder / COMMIT).read_text().strip()

    def add_times(self, steps: int, seconds: float) -> None:
        """Note the processor time of a process, and the steps that it took."""
        with open(self.folder / TIMES, "a") as file:
            file.write(f"{steps},{seconds:.3f}\n")

    def processor_seconds_per_step(self) -> float | None:
        """Mean over all processes that did not fail, including their start and evaluations.

        None if no time was noted.
        """
        try:
            times = np.loadtxt(self.folder / TIMES, delimiter=",", ndmin=2)
        except FileNotFoundError:
            return None
        steps, seconds = times[times[:, 0] > 0].sum(axis=0)
        return float(seconds / steps) if steps else None


def default_folder(quick: bool) -> Path:
    """The folder of the runs, unless the command line names one."""
    return fingerprint.ROOT / "runs" / ("study-quick" if quick else "study")


def plan(
    size: Size,
    corpus: Corpus,
    code: str,
    runs: Path,
    *,
    only: Sequence[str] = (),
    num_seeds: int | None = None,
    any_code: bool = False,
    variants: Mapping[str, Variant] = VARIANTS,
) -> list[Run]:
    """All runs of the study, first seeds first, so that the whole picture comes early.

    Args:
        code: the fingerprint of the training code.
        runs: the folder that holds the runs' folders.
        only: names of variants; all if empty.
        num_seeds: of each variant at most.
        variants: those of the study, by name.
        any_code: take a finished run with the same flags and data even if other code trained it.

    Raises:
        ValueError: there is no variant of that name.
    """
    for name in only:
        if name not in variants:
            raise ValueError(f"--only {name}: use one of {', '.join(variants)}.")
    chosen = [variants[name] for name in dict.fromkeys(only or variants)]
    most = max(variant.num_seeds for variant in chosen)
    planned = []
    for seed in range(1, min(most, num_seeds or most) + 1):
        for variant in chosen:
            if seed <= variant.num_seeds:
                scaled = size.scaled(variant.tokens)
                flags = training_flags(variant, scaled, seed)
                key = {"flags": flags, "data": corpus.fingerprint, "code": code}
                folder = runs / f"{variant.name}-seed{seed}-{_digest(key)}"
                run = Run(variant, seed, key, folder, scaled)
                if any_code and not run.is_finished:
                    run = _with_other_code(run) or run
                planned.append(run)
    return planned


def start(run: Run, corpus: Corpus) -> subprocess.Popen[str]:
    """Begin a run, or resume it from its last checkpoint.

    The process has a session of its own, so that Ctrl-C does not reach it. At SIGTERM it saves and
    ends.
    """
    where = ["--run-dir", str(run.folder)]
    if run.iteration:
        load = ["--load", str(run.folder / CHECKPOINTS), "--exit-on-missing-checkpoint"]
    else:  # without a checkpoint all steps are logged again
        load = []
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        (run.folder / KEY).write_text(json.dumps(run.key, indent=2) + "\n")
        (run.folder / COMMIT).write_text(fingerprint.commit() + "\n")
    steps = run.size.steps
    interval = steps // run.size.num_evaluations
    saving = ["--save-interval", str(interval), "--save-retain-interval", str(steps)]
    with open(run.folder / ERRORS, "a") as errors:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "megatron_dynmoe.pretrain"),
                *(*run.key["flags"], *corpus.flags(), *where, *saving, *load),
                "--exit-signal-handler",
            ],
            cwd=fingerprint.ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]


def _with_other_code(run: Run) -> Run | None:
    for folder in sorted(run.folder.parent.glob(f"{run.name}-*")):
        try:
            key = json.loads((folder / KEY).read_text())
        except (OSError, ValueError):
            continue
        other = dataclasses.replace(run, key=key, folder=folder)
        if key | {"code": ""} == run.key | {"code": ""} and other.is_finished:
            return other
    return None
