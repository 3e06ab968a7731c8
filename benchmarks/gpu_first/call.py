"""One call of the driver: from the preflight to the files, within its time."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_first import processes, publish, state, summary, surroundings
from benchmarks.gpu_first.outcome import judge
from benchmarks.gpu_first.stages import Stage

TO_END = 12.0  # seconds of the total, to end the last stage and write the files
PREFLIGHT = 60.0  # seconds at the most; it takes two or three
EVERY = 5.0  # seconds between two writings of the files while a stage runs
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Call:
    """Args are those of the command line."""

    def __init__(self, args: argparse.Namespace, table: Sequence[Stage]) -> None:
        self.args, self.table = args, table
        self.begun = processes.clock()
        self.signal: signal.Signals | None = None
        self.running = ""  # the stage
        self.written = 0.0  # when the files were
        self.mark = f"{os.getpid()}-{time.time_ns()}"

    def run(self) -> int:
        """Run what is left, as far as the time goes; returns the exit code.

        Raises:
            ValueError: another call is at work, or what was given cannot be read.
        """
        self.args.state, self.args.output = (
            path.absolute() for path in (self.args.state, self.args.output)
        )
        self.args.output.mkdir(parents=True, exist_ok=True)
        locked = state.lock(self.args.state)
        for number in SIGNALS:
            signal.signal(number, self._hear)
        self.temporary = Path(tempfile.mkdtemp(prefix="gpu-first-"))
        guard = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_first.guard", self.mark, self.temporary],
            stdin=subprocess.PIPE,
            pass_fds=[locked],
            process_group=0,
            cwd=state.ROOT,
        )
        try:
            return self._run()
        finally:
            processes.end_all(self.mark)
            shutil.rmtree(self.temporary, ignore_errors=True)
            guard.communicate(b"ended")

    def _run(self) -> int:
        self._say(f"{self.args.minutes:g} minutes in all; what does this machine have?")
        self.commit = state.commit(self.args.pack)
        self.site = surroundings.install_wheels(self.args.pack, self.args.state)
        found = self._preflight()
        if self.signal:
            return 128 + self.signal
        if any(lack["every_stage"] for lack in found["lacks"]):
            self._say("so nothing can run")
            return 2
        missing = {module for lack in found["lacks"] for module in lack["modules"]}
        device, code = found["device"]["name"], state.code()
        self.state = state.State.open(self.args.state, self.commit, code, device)
        if self.args.resume_from:
            taken = state.adopt(self.state, self.args.resume_from, self.args.any_code)
            self._say(f"taken from {self.args.resume_from}: {', '.join(taken) or 'nothing new'}")
        now = datetime.datetime.now().isoformat(sep=" ", timespec="minutes")
        self.call: dict[str, Any] = {"begun": now, "minutes": self.args.minutes, "seconds": 0.0}
        self.call["ended"] = "killed"  # if nobody writes otherwise
        self.state.calls.append(self.call)
        too_late = False  # for a stage, at least
        for stage in self._chosen():
            limit = min(stage.seconds, 60 * self.args.minutes - self._elapsed() - TO_END)
            if limit < stage.least:
                too_late = True
            elif not self.signal:
                self._run_stage(stage, limit, sorted(missing.intersection(stage.needs)))
        return self._end("the time is used up" if too_late else "all stages were tried")

    def _chosen(self) -> list[Stage]:
        if self.args.only:
            return [stage for stage in self.table if stage.name in self.args.only]
        return self.state.pending(self.table)

    def _preflight(self) -> dict[str, Any]:
        """What this machine has, and what it lacks."""
        needs = dict.fromkeys(module for stage in self.table for module in stage.needs)
        told, log = self.temporary / "preflight.json", self.temporary / "preflight.txt"
        command = [sys.executable, "-m", "benchmarks.gpu_first.preflight", "--json", str(told)]
        command += [*(["--rehearse"] if self.args.rehearse else []), "--needs", *needs]
        ended = processes.run(
            command,
            state.ROOT,
            self._environment(None, self.temporary),
            log,
            PREFLIGHT,
            self.mark,
            self._stopped,
        )
        print(log.read_text(errors="replace").partition("\n")[2], end="", flush=True)
        if not told.exists() and not self.signal:
            why = ended.why or f"ended with code {ended.code}"
            raise ValueError(f"the look at this machine (benchmarks.gpu_first.preflight): {why}")
        return json.loads(told.read_text()) if told.exists() else {}

    def _run_stage(self, stage: Stage, limit: float, missing: list[str]) -> None:
        """Run it, judge it, and write down what came of it."""
        folder = self.state.begin(stage.name)
        self.running = stage.name
        self._say(f"{stage.name}: {stage.asks}; at most {limit:.0f} s")
        self._write_files()
        if missing:
            ended = processes.Ended(None, f"{', '.join(missing)} is missing here", 0.0)
        else:
            ended = self._ended(stage, limit, folder)
        self.running = ""
        why = judge(stage, folder, ended, self.args.rehearse)
        # A limit that the whole call's had cut is no fault of the stage.
        is_cut = self.signal or (limit < stage.seconds and ended.seconds >= limit)
        became = state.DONE if not why else state.CUT if is_cut else state.FAILED
        self.state.end(stage.name, became, why, ended.seconds)
        said = f"{stage.name}: {became} after {ended.seconds:.0f} s" + (f": {why}" if why else "")
        self._say(said)
        self._write_files()

    def _ended(self, stage: Stage, limit: float, folder: Path) -> processes.Ended:
        temporary = self.temporary / stage.name
        temporary.mkdir()
        command = stage.words(
            self.args.rehearse,
            limit,
            python=sys.executable,
            folder=folder,
            temporary=temporary,
            pack=self.args.pack.absolute(),
        )
        around, log = self._environment(stage, temporary), folder / "log.txt"
        ended = processes.run(command, state.ROOT, around, log, limit, self.mark, self._watched)
        shutil.rmtree(temporary, ignore_errors=True)
        return ended

    def _environment(self, stage: Stage | None, temporary: Path) -> dict[str, str]:
        return surroundings.environment(
            stage, self.args.rehearse, self.site, self.args.state, temporary, self.commit
        )

    def _end(self, ended: str) -> int:
        self.call["ended"] = f"ended by {self.signal.name}" if self.signal else ended
        trouble = (state.FAILED, state.BEGUN)
        failed = [record for record in self.state.records.values() if record.state in trouble]
        self._write_files()
        print(f"\n{summary.write(self.state, self.table, self._again())}")
        self._say(f"{self.call['ended']}: {self.args.output}/{{{','.join(publish.FILES)}}}")
        return 128 + self.signal if self.signal else int(bool(failed))

    def _write_files(self) -> None:
        self.call["seconds"] = round(self._elapsed(), 1)
        self.state.save()
        publish.publish(self.state, self.table, self.args.output, self._again(), self.running)
        self.written = processes.clock()

    def _again(self) -> summary.Again:
        """The commands that go on, as make takes them."""
        here = f"make gpu-first OUTPUT={shlex.quote(str(self.args.output))}"
        here += f" MINUTES={self.args.minutes:g}" + (" DEVICE=cpu" if self.args.rehearse else "")
        return summary.Again(here, f"{here} RESUME=archive.tar.gz")

    def _hear(self, number: int, _frame: Any) -> None:
        self.signal = self.signal or signal.Signals(number)

    def _stopped(self) -> str:
        return f"the call got {self.signal.name}" if self.signal else ""

    def _watched(self) -> str:
        if processes.clock() - self.written > EVERY:
            self._write_files()
        return self._stopped()

    def _elapsed(self) -> float:
        return processes.clock() - self.begun

    def _say(self, text: str) -> None:
        print(f"[{self._elapsed():4.0f} s] {text}", flush=True)
