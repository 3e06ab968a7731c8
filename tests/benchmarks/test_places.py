"""Turns of providers, of which some fail."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks import measure, places
from benchmarks.places import Apart, Failed, Here, Turns


def test_turns_rotate_and_only_counted_rounds_count():
    called = []
    clock = itertools.count()

    def provider(name):
        def call():
            called.append(name)
            return next(clock)

        return call

    taken = places.take_turns({name: provider(name) for name in "abc"}, rounds=4, warm_up=2)
    rounds = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert rounds == ["bca", "cab", "abc", "bca", "cab", "abc"]
    assert taken == {"a": [6, 11, 13, 15], "b": [7, 9, 14, 16], "c": [8, 10, 12, 17]}


@pytest.mark.parametrize(("seconds", "taken"), [(2, places.MIN_ROUNDS), (9, 7), (600, 500)])
def test_turns_stop_when_the_time_is_used_up_but_not_before_the_least_number(
    monkeypatch, seconds, taken
):
    called = []  # each call takes a second
    monkeypatch.setattr(places, "clock", lambda: len(called))
    results = places.take_turns({"a": lambda: called.append(1)}, 500, seconds=seconds)
    assert len(results["a"]) == taken


def triton_errors():
    """Of a kernel: it does not compile, needs too much, is refused by the assembler."""
    errors = pytest.importorskip("triton").runtime.errors
    compilation = pytest.importorskip("triton.compiler.errors").CompilationError
    return [
        compilation("def kernel(): ...", None, "no such type"),
        errors.OutOfResources(300, 227, "shared memory"),
        errors.PTXASError("ptxas fatal"),
    ]


ERRORS = [*triton_errors(), torch.OutOfMemoryError("too large"), AssertionError("wrong")]


def fail(error: BaseException):
    raise error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_provider_that_raises_is_named_and_the_others_go_on(error, capsys):
    left_out = {}
    with Turns(Here) as turns:
        turns.make(
            {"bad": (fail, error), "late": (list,), "good": (int, "7")}, left_out.__setitem__
        )
        assert turns.ask_all(list.__len__) == {"late": 0}
        # An integer has no length.
        assert [*left_out] == ["bad", "good"]
    reason = str(left_out["bad"])
    assert reason.startswith(f"{type(error).__name__}: ")
    assert "\n" not in reason
    assert len(reason) <= places.LONGEST_REASON
    printed = capsys.readouterr()
    assert f"bad is left out: {reason}" in printed.out
    assert "Traceback" in printed.err


def test_a_provider_that_fails_in_its_third_round_has_no_results():
    called = itertools.count()

    def sometimes():
        if next(called) == 2:
            raise Failed("worn out")

    left_out = {}
    taken = places.take_turns(
        {"a": lambda: 1, "b": sometimes, "c": lambda: 3},
        rounds=4,
        warm_up=0,
        leave_out=left_out.__setitem__,
    )
    assert taken == {"a": [1] * 4, "c": [3] * 4}
    assert str(left_out["b"]) == "worn out"


# What a process of its own has, below, and what a sticky error of CUDA does to it.
STATE = {"usable": True}


class Provider:
    """A double: how it ends when it is asked for the second time."""

    def __init__(self, end: str) -> None:
        self.end, self.asked = end, 0

    def turn(self) -> int:
        self.asked += 1
        if not STATE["usable"]:
            raise torch.AcceleratorError("an illegal memory access was encountered")
        if self.asked == 2:
            if self.end == "sticky":
                STATE["usable"] = False
                raise torch.AcceleratorError("an illegal memory access was encountered")
            if self.end == "killed":
                print("its last words", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if self.end == "exits":
                sys.exit(2)
        return self.asked


@pytest.mark.slow
def test_what_kills_a_process_kills_no_other_provider(capsys):
    left_out, later = {}, {}
    ends = {end: (Provider, end) for end in ("sticky", "killed", "exits", "none")}
    with Turns(Apart) as turns:
        turns.make(ends, left_out.__setitem__)
        taken = turns.take(Provider.turn, rounds=3, warm_up=0)
        assert taken == {"none": [1, 2, 3]}
        assert {name: str(failure) for name, failure in left_out.items()} == {
            "sticky": "AcceleratorError: an illegal memory access was encountered",
            "killed": "its process ended with SIGKILL",
            "exits": "its process ended with status 2",
        }
        assert "its last words" in capsys.readouterr().out
        # The next case begins with a sound process, and with a new provider in the old one.
        turns.make({name: ends[name] for name in ("sticky", "none")}, later.__setitem__)
        assert turns.ask_all(Provider.turn) == {"sticky": 1, "none": 1}
        assert not later


def test_a_process_that_does_not_answer_is_left():
    place = Apart()
    assert place.run(os.getpid) != os.getpid()
    with pytest.raises(Failed, match="no answer after 0 s"):
        place.run(time.sleep, 10_000, seconds=0.2)
    place.close()  # without waiting for it


@pytest.mark.long
def test_the_processes_of_a_killed_benchmark_end(tmp_path):
    script = tmp_path / "benchmark.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, time
            from benchmarks.places import Apart

            if __name__ == "__main__":
                place = Apart()
                print(place.run(os.getpid), flush=True)
                place.run(time.sleep, 10_000)
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(measure.ROOT)}
    benchmark = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    )
    provider = Path("/proc") / benchmark.stdout.readline().strip()
    assert provider.exists()
    benchmark.kill()
    benchmark.wait()
    deadline = time.monotonic() + 900
    while provider.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not provider.exists()
