"""launch/pretrain_dtop_p.sh on a real Slurm of two nodes, the pipeline across both, on CPU.

One run goes to its end at once, a rank to a task. Another, under torchrun, gets SIGTERM midway, is
queued again by its script and goes on. They must agree on every value that they log.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_dynmoe.runs.events import read_scalars
from tests.slurm import two_nodes

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(two_nodes.missing() is not None, reason=f"no Slurm: {two_nodes.missing()}"),
]

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "pretrain_dtop_p.sh"
STEPS, STOPPED_AFTER = 60, 2  # of so many that the signal comes midway on a busy machine, too
SMOKE = (
    f"smoke --pipeline-model-parallel-size 2 --train-iters {STEPS} --global-batch-size 2 "
    "--save-interval 15 --data-path /no/c.shuffled/text"  # left out; a name to stumble over
)
PATIENCE = 300  # seconds for a job, on a busy machine
VALUES = ("lm loss", "dynmoe/threshold", "dynmoe/experts_per_token", "grad-norm")


class Cluster:
    """The running Slurm, and a folder for the logs of its jobs."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder

    def command(self, *words: str) -> str:
        """The output of one of Slurm's commands."""
        answer = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=True
        )
        return answer.stdout.strip()

    def submit(self, run: str, flags: str = SMOKE, settings: str = "") -> str:
        """Submit the script on two nodes, for the run of that name; the job's number."""
        file = self.folder / f"{run}.env"
        file.write_text(f"DEVICE=cpu\n{settings}\n")
        self.environment["CLUSTER_ENV"] = str(file)
        options = ["--parsable", "--nodes=2", f"--chdir={self.folder}", f"--job-name={run}"]
        return self.command("sbatch", *options, str(SCRIPT), *flags.split(), "--run-dir", run)

    def wait(self, job: str) -> str:
        """The state in which the job ended."""
        wait_until(lambda: not self.command("squeue", "--noheader", "--jobs", job), self.log)
        facts = self.command("scontrol", "show", "job", job)
        return facts.partition("JobState=")[2].split()[0]

    def log(self) -> str:
        """What the jobs wrote, and their ranks."""
        paths = [*self.folder.glob("*.log"), *self.folder.glob("*/attempts/*/rank-*.log")]
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in paths)


def wait_until(condition: Callable[[], bool], explain: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"nothing for {PATIENCE} s\n{explain()}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with two_nodes.running() as environment:
        yield Cluster(environment, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Path:
    """The run that was never stopped."""
    assert cluster.wait(cluster.submit("whole", settings="LAUNCHER=srun")) == "COMPLETED", (
        cluster.log()
    )
    return cluster.folder / "whole"


@pytest.fixture(scope="module")
def stopped(cluster: Cluster) -> Path:
    """The run whose script got SIGTERM midway, and passed it on to the ranks."""
    job = cluster.submit("stopped", settings="LAUNCHER=torchrun")
    log = cluster.folder / "stopped" / "attempts" / "0001" / "rank-001.log"
    step = f"iteration {STOPPED_AFTER:8d}/"
    wait_until(lambda: log.exists() and step in log.read_text(), cluster.log)
    cluster.command("scancel", "--batch", "--signal=TERM", job)
    assert cluster.wait(job) == "COMPLETED", cluster.log()
    return cluster.folder / "stopped"


def test_a_run_goes_to_its_end_on_two_nodes(cluster, whole):
    assert (whole / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
    assert (whole / "summary.json").exists() and (whole / "curves.png").exists()
    logs = sorted(path.name for path in (whole / "attempts" / "0001").glob("rank-*.log"))
    assert logs == ["rank-000.log", "rank-001.log"]
    told = "".join(path.read_text() for path in cluster.folder.glob("whole-*.log"))
    assert f"finished: whole (checkpoint {STEPS})" in told


def test_sigterm_midway_and_a_requeue_change_no_bit(whole, stopped):
    first, second = sorted((stopped / "attempts").iterdir())
    assert "exiting program after receiving SIGTERM" in (first / "rank-000.log").read_text()
    began = (second / "attempt.json").read_text()
    assert '"iteration": null' not in began and f'"iteration": {STEPS}' not in began
    expected, found = read_scalars(whole), read_scalars(stopped)
    for name in VALUES:
        assert expected[name].iterations == list(range(1, STEPS + 1))
        assert found[name].iterations == expected[name].iterations, name
        assert found[name].values == expected[name].values, name


def test_a_finished_run_is_not_trained_again(cluster, whole):
    job = cluster.submit("whole")
    assert cluster.wait(job) == "COMPLETED"
    assert "the run is finished" in (cluster.folder / f"whole-{job}.log").read_text()
    assert len(list((whole / "attempts").iterdir())) == 1


@pytest.mark.parametrize("name", ["dtop_p", "dynamic", "topk", "dense"])
def test_a_job_is_called_after_its_script(cluster, name):
    """Links, too, of which Slurm copies the one file that they lead to."""
    script = SCRIPT.with_name(f"pretrain_{name}.sh")
    options = ["--parsable", "--hold", f"--chdir={cluster.folder}"]
    job = cluster.command("sbatch", *options, str(script))
    told = cluster.command("scontrol", "show", "job", job)
    cluster.command("scancel", job)
    assert f"JobName={script.name}\n" in told
    assert f"StdOut={cluster.folder / script.name}-{job}.log" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("smokey", "did you mean smoke?"),
        ("smoke --num-layers 5 --pipeline-model-parallel-size 2", "--num-layers is 5"),
    ],
)
def test_a_mistake_ends_the_job_before_its_processes_start(cluster, flags, message):
    job = cluster.submit("mistake", flags=flags)
    assert cluster.wait(job) == "FAILED"
    log = (cluster.folder / f"mistake-{job}.log").read_text()
    assert f"error: {'recipe' if 'y' in flags.split()[0] else ''}" in log and message in log
    assert not (cluster.folder / "mistake").exists()
