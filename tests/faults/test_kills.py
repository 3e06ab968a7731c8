"""``kill -9``: survivors stop with an error, and the run goes on to the same bits.

``--kills N`` moments are spread over runs that are killed up to three times in a row, under two
layouts and two launchers. What dies, and when, is drawn from a seed that every test prints.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_dynmoe.storage.megatron_names import TRACKER
from tests.distributed.harness import DTOP_P, TINY, Case, CaseResult
from tests.distributed.test_resume import checkpoint, differences
from tests.faults.kill_points import (
    AFTERWARDS,
    ANY_MOMENT,
    BETWEEN,
    EVERYTHING,
    FORWARD,
    LOADING,
    ONE_RANK,
    SAVE_PHASES,
    UPDATE,
    Kill,
    draw_kill,
)
from tests.faults.launching import ONE_BY_ONE, PATIENCE, TORCHRUN, Attempt, start

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

STEPS, INTERVAL, NUM_RANKS, MOST_IN_A_ROW = 12, 3, 2, 3
# Seconds from the kill until nothing runs any more. Survivors notice a closed connection at once:
# the rest is for a busy machine, and torchrun's grace for a rank that does not end.
GRACE, BOUND = 30, 60
FLAGS = (
    f"{TINY} {DTOP_P} --num-layers 2 --num-experts 4 --micro-batch-size 1 --train-iters {STEPS} "
    f"--split 1,0,0 --save-interval {INTERVAL} --hidden-dropout 0.1 --attention-dropout 0.1 "
    "--num-workers 1"
)
LAYOUTS = {
    "ep2": "--expert-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2",
}
SETTINGS = [(layout, launcher) for launcher in (TORCHRUN, ONE_BY_ONE) for layout in LAYOUTS]


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody kills: its checkpoints' folder, and the lines of every rank by step."""

    folder: Path
    steps: list[dict[int, str]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a run: the kills in it are numbered from the first of all."""
    if "numbers" not in metafunc.fixturenames:
        return
    numbers = range(metafunc.config.getoption("kills"))
    runs = list(itertools.batched(numbers, MOST_IN_A_ROW))
    settings = list(itertools.islice(itertools.cycle(SETTINGS), len(runs)))
    metafunc.parametrize(
        ("layout", "launcher", "numbers"),
        [(*setting, run) for setting, run in zip(settings, runs, strict=True)],
        ids=[
            f"{layout}-{launcher.replace(' ', '_')}-{run[0] + 1}to{run[-1] + 1}"
            for (layout, launcher), run in zip(settings, runs, strict=True)
        ],
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """By layout; trained when first asked for."""
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}

    def of(layout: str) -> Undisturbed:
        if layout not in found:
            run_dir = folder / layout
            attempt = start(TORCHRUN, NUM_RANKS, flags(layout, run_dir), folder / f"{layout}.logs")
            attempt.wait_until_all_have_ended(PATIENCE)
            assert attempt.exit_codes() == [0], attempt.log()
            steps = [dict(steps_of(attempt, rank)) for rank in range(NUM_RANKS)]
            assert list(steps[0]) == list(range(1, STEPS + 1))
            found[layout] = Undisturbed(run_dir, steps)
        return found[layout]

    return of


def test_killed_runs_end_like_an_undisturbed_one(
    tmp_path: Path, request, undisturbed, layout: str, launcher: str, numbers: tuple[int, ...]
) -> None:
    seed = request.config.getoption("kill_seed")
    phases = shuffled_phases(seed)
    reference, run_dir = undisturbed(layout), tmp_path / "run"
    for number in numbers:
        generator = random.Random(f"{seed} {number}")
        reached = latest(run_dir)
        phase = phases[(number - 1) % len(phases)]
        # The first of all dies before there is a checkpoint.
        last = INTERVAL if number == 0 else STEPS
        if number == 0 or (phase == LOADING and reached == 0):
            phase = generator.choice((FORWARD, UPDATE))
        elif reached == STEPS:  # a random moment came after the end: only this can still happen
            phase = LOADING
        kill = draw_kill(generator, phase, reached, last, INTERVAL, NUM_RANKS)
        print(f"kill {number + 1}, --kill-seed {seed}, {layout} {launcher}: {kill}")
        attempt = start(
            launcher, NUM_RANKS, flags(layout, run_dir), tmp_path / f"kill {number + 1}", kill
        )
        check_end(attempt, kill, launcher)
        check_steps(attempt, reference, reached)
        if phase not in (ANY_MOMENT, LOADING):
            assert latest(run_dir) == kill.checkpoint_before(INTERVAL), attempt.log()

    reached = latest(run_dir)
    attempt = start(launcher, NUM_RANKS, flags(layout, run_dir), tmp_path / "to the end")
    attempt.wait_until_all_have_ended(PATIENCE)
    assert set(attempt.exit_codes()) == {0}, attempt.log()
    check_steps(attempt, reference, reached, STEPS)
    saved = [
        checkpoint(CaseResult(Case("checkpoints"), d, []), STEPS)
        for d in (reference.folder, run_dir)
    ]
    assert differences(*saved) == {}
    assert (run_dir / "finished.json").exists()


@pytest.mark.long
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(tmp_path: Path) -> None:
    words = [*flags("ep2", tmp_path / "run"), "--distributed-timeout-minutes", "1"]
    kill = Kill(FORWARD, iteration=2, victims=ONE_RANK, rank=1, signal=signal.SIGSTOP)
    attempt = start(TORCHRUN, NUM_RANKS, words, tmp_path / "hangs", kill)
    ended = attempt.wait_until_all_have_ended(PATIENCE + 60 + GRACE + BOUND)
    seconds = ended - json.loads((attempt.folder / "killed.json").read_text())["at"]
    print(f"all had ended {seconds:.1f} s after one rank had stopped to answer")
    assert 60 - 1 < seconds < 60 + GRACE + BOUND
    assert attempt.exit_codes() == [1]


def flags(layout: str, run_dir: Path) -> list[str]:
    """The same for every attempt: they load what there is."""
    words = f"{FLAGS} {LAYOUTS[layout]} --run-dir {run_dir} --load {run_dir}/checkpoints"
    return words.split()


def shuffled_phases(seed: int) -> list[str]:
    """All phases in an order of the seed's, random moments three times as often as the others."""
    phases = [*SAVE_PHASES, FORWARD, UPDATE, LOADING, ANY_MOMENT, ANY_MOMENT, ANY_MOMENT]
    random.Random(seed).shuffle(phases)
    return phases


def check_end(attempt: Attempt, kill: Kill, launcher: str) -> None:
    """It died where it was to die, and everything else has ended with an error in time."""
    ended = attempt.wait_until_all_have_ended(PATIENCE + BOUND)
    told = attempt.folder / "killed.json"
    assert told.exists(), f"it was never killed\n{attempt.log()}"
    killed = json.loads(told.read_text())
    seconds = ended - killed["at"]
    print(f"  died {killed['place']} {killed['iteration']}; all had ended after {seconds:.1f} s")
    assert seconds < BOUND
    if kill.place is not None:
        assert killed["place"] == kill.place
    if kill.phase not in (ANY_MOMENT, LOADING):
        assert killed["iteration"] == kill.iteration
    codes = attempt.exit_codes()
    if launcher == ONE_BY_ONE:
        # Once the last checkpoint is saved ranks need each other no more: others may have ended.
        is_over = killed["iteration"] == STEPS and killed["place"] in (BETWEEN, AFTERWARDS)
        for rank, code in enumerate(codes):
            dead = kill.victims != ONE_RANK or rank == kill.rank
            has_ended = is_over and rank != kill.rank and code == 0
            assert has_ended or (code == -9 if dead else code == 1), (rank, code, attempt.log())
    else:
        assert codes == [-9 if kill.victims == EVERYTHING else 1], attempt.log()


def check_steps(
    attempt: Attempt, reference: Undisturbed, reached: int, end: int | None = None
) -> None:
    """Every step of every rank is bit for bit that of the undisturbed run."""
    for rank in range(NUM_RANKS):
        steps = list(steps_of(attempt, rank))
        iterations = [iteration for iteration, _ in steps]
        assert iterations == list(range(reached + 1, (end or reached + len(steps)) + 1)), (
            attempt.log()
        )
        for iteration, line in steps:
            assert line == reference.steps[rank][iteration], f"rank {rank}, iteration {iteration}"


def steps_of(attempt: Attempt, rank: int) -> Iterator[tuple[int, str]]:
    """What a rank noted of each step: loss, gradient norm, thresholds, integrals, counts."""
    path = attempt.folder / f"rank{rank}.steps"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):  # the last may be cut short
            yield json.loads(line)["iteration"], line


def latest(run_dir: Path) -> int:
    """The iteration that the tracker names, or 0 if there is none."""
    tracker = run_dir / "checkpoints" / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0
