"""SIGTERM, SIGINT, SIGHUP: one checkpoint, one clean exit, and an exit code that says so."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from megatron.training import global_vars

from megatron_dynmoe.checkpoints.load import choose_checkpoint
from megatron_dynmoe.training.signals import StopSignals, disable_without_training
from tests.distributed.harness import DTOP_P, TINY, Case, CaseResult
from tests.distributed.test_resume import checkpoint, differences
from tests.faults.kill_points import noted_pids
from tests.faults.launching import ONE_BY_ONE, PATIENCE, TORCHRUN, Attempt, start

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

ENDLESS = "--train-iters 100000"
FLAGS = (
    f"{TINY} {DTOP_P} --num-layers 2 --num-experts 4 --micro-batch-size 1 --split 1,0,0 "
    "--save-interval 100000"
)
EP2 = "--expert-model-parallel-size 2"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def begin(launcher: str, num_ranks: int, flags: str, tmp_path: Path, name: str = "run") -> Attempt:
    """A run that has made two steps."""
    words = f"{FLAGS} {flags} --save {tmp_path / 'save'}".split()
    attempt = start(launcher, num_ranks, words, tmp_path / name)
    wait_for(lambda: steps_of(attempt) >= 2, attempt)
    return attempt


def steps_of(attempt: Attempt) -> int:
    path = attempt.folder / "rank0.steps"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(happens: Callable[[], bool], attempt: Attempt) -> None:
    end = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < end, attempt.log()
        time.sleep(0.01)


def send(number: int, attempt: Attempt, names: str) -> None:
    for pid in noted_pids(attempt.folder, names):
        with contextlib.suppress(ProcessLookupError):  # of several signals, some may come late
            os.kill(pid, number)


def check_end(attempt: Attempt, exit_code: int, save: Path) -> None:
    """One checkpoint, of the last step that was taken."""
    attempt.wait_until_all_have_ended(PATIENCE)
    assert attempt.exit_codes() == [exit_code], attempt.log()
    assert [path.name for path in save.glob("iter_*")] == [f"iter_{steps_of(attempt):07d}"]
    assert choose_checkpoint(save) == steps_of(attempt)
    assert "Traceback" not in "".join(path.read_text() for path in attempt.folder.glob("rank*.log"))


@pytest.mark.parametrize(
    "number", [SIGNALS[0], *(pytest.param(n, marks=pytest.mark.long) for n in SIGNALS[1:])]
)
def test_one_process(tmp_path: Path, number: signal.Signals) -> None:
    attempt = begin(ONE_BY_ONE, 1, ENDLESS, tmp_path)
    send(number, attempt, "rank0.pid")
    check_end(attempt, 128 + number, tmp_path / "save")
    assert f"{number.name}: ending after this step, with a checkpoint" in attempt.log()


TARGETS = {"one rank": "rank1.pid", "all ranks": "rank*.pid", "torchrun": "agent.pid"}


@pytest.mark.parametrize(
    ("number", "target"),
    [
        (signal.SIGINT, "one rank"),
        *(
            pytest.param(number, target, marks=pytest.mark.long)
            for number in SIGNALS
            for target in TARGETS
            if (number, target) != (signal.SIGINT, "one rank")
        ),
    ],
)
def test_under_torchrun(tmp_path: Path, number: signal.Signals, target: str) -> None:
    attempt = begin(TORCHRUN, 2, f"{ENDLESS} {EP2}", tmp_path)
    send(number, attempt, TARGETS[target])
    check_end(attempt, 1, tmp_path / "save")  # torchrun's own, whatever its ranks end with
    if target != "torchrun":
        said = (attempt.folder / "agent.log").read_text()
        assert re.search(rf"exitcode\s*: {128 + number}\b", said), said


@pytest.mark.long
def test_more_signals_do_not_disturb_the_save(tmp_path: Path) -> None:
    attempt = begin(TORCHRUN, 2, f"{ENDLESS} {EP2}", tmp_path)
    for number in (*SIGNALS, *SIGNALS, *SIGNALS):
        send(number, attempt, "rank*.pid")
        time.sleep(0.05)
    check_end(attempt, 1, tmp_path / "save")


@pytest.mark.long
def test_the_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    length = "--train-iters 200"  # not at its end when the signal comes, also on a busy machine
    attempt = begin(TORCHRUN, 2, f"{length} {EP2}", tmp_path)
    send(signal.SIGTERM, attempt, "rank0.pid")
    check_end(attempt, 1, tmp_path / "save")
    ends = []
    for name, flags in (
        ("resumed", f"--load {tmp_path}/save --save {tmp_path}/resumed"),
        ("whole", f"--save {tmp_path}/whole"),
    ):
        words = f"{FLAGS} {length} {EP2} {flags}".split()
        run = start(TORCHRUN, 2, words, tmp_path / f"{name}.logs")
        run.wait_until_all_have_ended(PATIENCE)
        assert run.exit_codes() == [0], run.log()
        ends.append(checkpoint(CaseResult(Case(name), tmp_path, []), 200))
    assert differences(*ends) == {}


@pytest.mark.long
def test_ctrl_c_reaches_the_processes_that_load_data_too(tmp_path: Path) -> None:
    attempt = begin(ONE_BY_ONE, 1, f"{ENDLESS} --num-workers 1", tmp_path)
    (pid,) = noted_pids(attempt.folder, "rank0.pid")
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    assert len(family) > 1
    for process in family:
        process.send_signal(signal.SIGINT)
    check_end(attempt, 130, tmp_path / "save")


@pytest.mark.long
def test_without_the_handler_a_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    attempt = begin(ONE_BY_ONE, 1, f"{ENDLESS} --no-exit-signal-handler", tmp_path)
    send(signal.SIGTERM, attempt, "rank0.pid")
    attempt.wait_until_all_have_ended(PATIENCE)
    assert attempt.exit_codes() == [-signal.SIGTERM]
    assert not list((tmp_path / "save").glob("iter_*"))


@pytest.fixture
def dispositions() -> Iterator[None]:
    """What pytest does on signals, afterwards again."""
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("save", "promise"), [("runs/mine", "with a checkpoint"), (None, "without a checkpoint, as")]
)
def test_only_a_run_with_a_place_for_it_promises_a_checkpoint(
    dispositions, monkeypatch, capfd, save: str | None, promise: str
) -> None:
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", Namespace(save=save))
    StopSignals().__enter__()
    os.kill(os.getpid(), signal.SIGTERM)
    assert f"SIGTERM: ending after this step, {promise}" in capfd.readouterr().err


def test_the_first_signal_counts(dispositions, monkeypatch, capfd) -> None:
    """After a Ctrl-C torchrun sends SIGTERM, and the run has ended because of the former."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    signals = StopSignals().__enter__()
    assert signals.signals_received() == [0]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert signals.signals_received() == [signal.SIGINT]
    assert capfd.readouterr().err.count("ending after this step") == 1


@pytest.mark.parametrize(("asked", "skip_train"), [(True, False), (True, True), (False, False)])
def test_an_evaluation_alone_ends_at_once(asked: bool, skip_train: bool) -> None:
    """Nothing asks in it what was heard: it would go on to its end."""
    args = Namespace(exit_signal_handler=asked, skip_train=skip_train)
    disable_without_training(args)
    assert args.exit_signal_handler is (asked and not skip_train)


def test_what_is_ignored_stays_ignored_but_for_sigterm(dispositions) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    StopSignals(signal.SIGTERM).__enter__()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # a script's background
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN  # launch/rank.sh ignores it
