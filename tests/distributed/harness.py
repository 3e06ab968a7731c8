"""Runs test cases in real processes over gloo, many cases to one session.

A test module describes its runs as cases and asks for their results::

    EP2 = add(Case("ep2", num_ranks=2, flags=f"{TINY} {DTOP_P} --expert-model-parallel-size 2"))

    def test_ep2(results):
        assert results[EP2].losses[-1] < results[EP2].losses[0]

The first result asked for runs the cases of all selected tests, once. Tests that need a session of
their own call :func:`run_session`. In flags and environment, ``{dir}`` is the session's directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SESSION_TIMEOUT = 3600  # seconds: a busy machine with two cores takes 300

# A model that takes a step in some ten milliseconds: 4 layers of 8 experts, dropout off.
TINY = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 3 "
    "--lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 0 --hidden-dropout 0 "
    "--attention-dropout 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 120 "
    "--make-vocab-size-divisible-by 8 --normalization RMSNorm --swiglu --disable-bias-linear "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --num-experts 8 "
    "--log-interval 1 --eval-iters 0 --eval-interval 1000 --num-workers 0 "
    "--distributed-timeout-minutes 5 --no-create-attention-mask-in-dataloader"
)
DTOP_P = "--moe-dynamic-routing dtop_p --moe-dynamic-target-experts-per-token 2"
SEQ_TOP_K = (
    "--moe-dynamic-routing seq_top_k --moe-dynamic-target-experts-per-token 1.5 "
    "--moe-dynamic-max-experts-per-token 3"
)


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: of its files; unique in the session.
        num_ranks: size of its world.
        flags: the command line.
        entry: ``module:function`` to call with that command line.
        hooks: ``module:function`` of context managers around the call, each called with the
            worker's Recorder: injected faults and probes.
        env: environment variables to set.
        files: texts to write into the session's directory first, by name.
        after: cases that have to be finished before.
    """

    name: str
    num_ranks: int = 1
    flags: str = ""
    entry: str = "megatron_dynmoe.pretrain:main"
    hooks: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict, hash=False)
    files: dict[str, str] = field(default_factory=dict, hash=False)
    after: tuple[Case, ...] = ()


@dataclass(frozen=True)
class CaseResult:
    """What every rank of a case left: its result (see the worker's Recorder) and its log."""

    case: Case
    directory: Path
    ranks: list[dict[str, Any]]

    def log(self, rank: int = -1) -> str:
        """The output of one rank; by default the last, which prints the training log."""
        path = self.directory / f"{self.case.name}.rank{rank % self.case.num_ranks}.log"
        return path.read_text() if path.exists() else "(no log)"

    @property
    def error(self) -> str | None:
        """The traceback of the first rank that raised."""
        return next((rank["error"] for rank in self.ranks if "error" in rank), None)

    def check(self) -> CaseResult:
        """Fail with the traceback and the end of each log if any rank raised."""
        if self.error is not None:
            tails = [
                f"--- {self.case.name}, rank {rank}\n" + self.log(rank)[-3000:]
                for rank in range(self.case.num_ranks)
            ]
            raise AssertionError("\n".join([self.error, *tails]))
        return self

    @property
    def losses(self) -> list[float]:
        """Language-model loss of each step."""
        return [step["loss"] for step in self.ranks[-1]["steps"]]

    @property
    def finalized(self) -> list[dict[str, Any]]:
        """The reduced statistics of each finalized batch; fails unless all ranks have the same."""
        first, *others = (rank["finalized"] for rank in self.ranks)
        for other in others:
            # Repr, because NaN is not equal to itself.
            assert repr(other) == repr(first), f"{self.case.name}: ranks disagree on the counts"
        return first

    @property
    def assignments(self) -> list[list[list[float]]]:
        """Tokens per step, layer and expert."""
        return [batch["assignments"] for batch in self.finalized]

    @property
    def experts_per_token(self) -> list[float]:
        """Mean over layers and tokens, of each step."""
        return [
            sum(sum(layer) for layer in batch["assignments"]) / sum(batch["tokens"])
            for batch in self.finalized
        ]

    def by_layer(self, name: str) -> list[dict[int, float]]:
        """``threshold``, ``integral``, ``measured``, ``theta`` or ``counted`` after each step.

        By layer number. Fails if two ranks hold different values for one layer.
        """
        merged: list[dict[int, float]] = []
        for steps in zip(*(rank["steps"] for rank in self.ranks), strict=True):
            values: dict[int, float] = {}
            for rank, step in enumerate(steps):
                for layer, value in step[name].items():
                    known = values.setdefault(int(layer), value)
                    assert known == value, (
                        f"{self.case.name}: {name} of layer {layer} is {value} on rank {rank}, "
                        f"{known} on another"
                    )
            merged.append(dict(sorted(values.items())))
        return merged

    @property
    def thresholds(self) -> list[float]:
        """The threshold after each step; fails unless all layers on all ranks share it."""
        found = []
        for values in self.by_layer("threshold"):
            assert len(set(values.values())) == 1, f"{self.case.name}: thresholds are {values}"
            found.append(next(iter(values.values())))
        return found


class Results:
    """Results of the cases of the selected tests, which run when the first one is asked for.

    Args:
        directory: where they run.
        names: of these cases; see :mod:`tests.distributed.selection`. Others run, each in a session
            of its own, if a test asks for them all the same.
    """

    def __init__(self, directory: Path, names: Collection[str]) -> None:
        self.directory = directory
        self._names = names
        self._results: dict[str, CaseResult] = {}

    def __getitem__(self, case: Case) -> CaseResult:
        """The result of a case, which must not have failed."""
        return self.any(case).check()

    def any(self, case: Case) -> CaseResult:
        """The result of a case, whether or not it failed."""
        if case.name not in self._results:
            wanted, directory = [case], self.directory
            if not self._results:
                wanted += [other for other in _CASES if other.name in self._names]
            else:
                directory = self.directory / f"for_{case.name}"
                directory.mkdir()
            self._results |= run_session(_with_those_before(wanted), directory)
        return self._results[case.name]


_CASES: list[Case] = []


def _with_those_before(cases: list[Case]) -> list[Case]:
    """The cases and those that have to be finished before, in the order in which all were added."""
    wanted: set[str] = set()
    waiting = list(cases)
    while waiting:
        case = waiting.pop()
        wanted.add(case.name)
        waiting += case.after
    return [case for case in _CASES if case.name in wanted]


def add(case: Case) -> Case:
    """Have the case run in the session that all test modules share."""
    if case not in _CASES:
        assert case.name not in {other.name for other in _CASES}, f"two cases are {case.name}"
        _CASES.append(case)
    return case


def run_session(
    cases: list[Case], directory: Path, environment: dict[str, str] | None = None
) -> dict[str, CaseResult]:
    """Run all cases in one session, as far as possible side by side.

    Args:
        cases: each after those it names in ``after``.
        directory: for results, logs and whatever the cases write.
        environment: variables that have to be set before the processes import torch.

    Returns:
        Results by the cases' names. A case that did not end has an error.
    """
    num_processes = max(case.num_ranks for case in cases)
    load, placed = [0] * num_processes, []
    for case in cases:
        settings = dataclasses.asdict(case)
        settings["flags"] = [
            word.replace("{dir}", str(directory)) for word in shlex.split(case.flags)
        ]
        settings["env"] = {
            name: value.replace("{dir}", str(directory)) for name, value in case.env.items()
        }
        for name, text in settings.pop("files").items():
            (directory / name).write_text(text)
        settings["after"] = [other.name for other in case.after]
        first = min(
            range(num_processes - case.num_ranks + 1),
            key=lambda start: max(load[start : start + case.num_ranks]),
        )
        ends = max(load[first : first + case.num_ranks]) + 1
        load[first : first + case.num_ranks] = [ends] * case.num_ranks
        placed.append(settings | {"first_process": first})
    (directory / "cases.json").write_text(json.dumps(placed))

    with open(directory / "session.log", "w") as log:
        worker = REPOSITORY / "tests/distributed/worker.py"
        command = [sys.executable, str(worker), str(directory), str(num_processes)]
        path = os.environ.get("PYTHONPATH", "")  # a Megatron that is tried stands there
        path = os.pathsep.join([*filter(None, [path]), str(REPOSITORY)])
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        variables |= environment or {}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=directory)
        try:
            process.wait(SESSION_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # its workers end with it
            process.wait()
    return {case.name: _read(case, directory) for case in cases}


def _read(case: Case, directory: Path) -> CaseResult:
    ranks = []
    for rank in range(case.num_ranks):
        path = directory / f"{case.name}.rank{rank}.json"
        if path.exists():
            ranks.append(json.loads(path.read_text()))
        else:
            end = (directory / "session.log").read_text()[-3000:]
            ranks.append({"error": f"rank {rank} did not end; the session's log:\n{end}"})
    return CaseResult(case, directory, ranks)
