"""Starts the driver of the first minutes, and looks at what it leaves."""

import csv
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from benchmarks.gpu_first import processes, publish

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 900  # seconds, after which a test has failed; no machine is that slow


class Driver:
    """One plan of stages, in a folder with its output and state.

    Attributes:
        module: what is started.
    """

    module = "benchmarks.gpu_first"

    def __init__(
        self, folder: Path, python: str = sys.executable, around: Mapping[str, str] | None = None
    ) -> None:
        """``python`` is the interpreter; ``around`` its environment, by default this one's."""
        self.folder, self.output, self.python = folder, folder / "output", python
        self.flags = ["--rehearse", "--output", str(self.output)]
        self.token = uuid.uuid4().hex  # all processes inherit it
        self.around = {**(os.environ if around is None else around), "TMPDIR": str(folder)}
        self.around["TOKEN"] = self.token

    def start(self, *flags: str, state: str = "state") -> subprocess.Popen[str]:
        """Start it, with a state of this name."""
        command = [self.python, "-m", self.module, *self.flags, *flags]
        return subprocess.Popen(
            [*command, "--state", str(self.folder / state)],
            cwd=ROOT,
            env=self.around,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=processes.ending_with_parent(),  # also if the test is killed
        )

    def run(self, *flags: str, state: str = "state", seconds: float = PATIENCE) -> tuple[int, str]:
        """Start it and wait; returns its exit code and what it said."""
        process = self.start(*flags, state=state)
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said

    def kill(
        self,
        name: str,
        number: signal.Signals,
        text: str = "$ ",
        delay: float = 0.0,
        seconds: float = PATIENCE,
    ) -> None:
        """Start it, and send a signal so many seconds after this stage has printed the text."""
        process = self.start()
        self.wait_until_it_runs(process, name, text, seconds)
        until = time.monotonic() + delay
        while time.monotonic() < until and self.states()[name] == "begun":
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)

    def wait_until_it_runs(
        self,
        process: subprocess.Popen[str],
        name: str,
        text: str = "$ ",
        seconds: float = PATIENCE,
    ) -> None:
        """Wait until a stage has printed the text."""
        until = time.monotonic() + seconds
        while text not in self.log_of(name) or self.states().get(name) != "begun":
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.02)

    def log_of(self, name: str) -> str:
        """What a stage has printed so far."""
        found = [*self.folder.glob(f"state/runs/*/stages/{name}/log.txt")]
        return found[0].read_text(errors="replace") if found else ""

    def states(self) -> dict[str, str]:
        """What became of each stage."""
        found = [*self.folder.glob("state/runs/*/state.json")]
        records = json.loads(found[0].read_text())["records"] if found else {}
        return {name: record["state"] for name, record in records.items()}

    def summary(self) -> str:
        """Its text."""
        return (self.output / "summary.md").read_text()

    def rows(self) -> list[dict[str, str]]:
        """Those of all stages."""
        with (self.output / "rows.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def archived(self) -> dict[str, bytes]:
        """The archive's files, by name."""
        with tarfile.open(self.output / "archive.tar.gz") as tar:
            return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}

    def left_over(self) -> list[int]:
        """Processes of this driver that still run."""
        token, found = f"TOKEN={self.token}".encode(), []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    environment = (folder / "environ").read_bytes()
                except OSError:  # it has just ended
                    continue
                if token in environment.split(b"\0"):
                    found.append(int(folder.name))
        return found

    def assert_whole(self) -> None:
        """Three files, whole and readable, and nothing else; no process; no temporary folder."""
        until = time.monotonic() + PATIENCE
        while self.left_over():
            assert time.monotonic() < until, "processes are left"
            time.sleep(0.02)
        assert sorted(path.name for path in self.output.iterdir()) == sorted(publish.FILES)
        assert self.summary().startswith("# First minutes on a CPU, a rehearsal")
        assert self.summary().endswith("\n")
        for row in self.rows():
            assert None not in row and None not in row.values()
        assert json.loads(self.archived()["state.json"])["records"]
        assert not list(self.folder.glob("gpu-first-*"))


class Clocked(Driver):
    """The driver by a clock that stands still until a stage moves it, however fast a machine is."""

    module = "tests.benchmarks.gpu_first.clocked"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.around["CLOCK"] = str(folder / "clock")
