"""What is done and what is left, on the disk, so that a second call goes on.

STATE/lock                      one call at a time
STATE/site/                     wheels that this machine lacked
STATE/cache/                    what Triton and PyTorch have compiled
STATE/runs/RUN/state.json       a run: one code on one kind of device
STATE/runs/RUN/stages/NAME/     a stage's log and files
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_first.stages import Stage
from megatron_dynmoe.storage.atomic import new_folder, replace_file
from study import fingerprint

ROOT = fingerprint.ROOT
# A run is of one code: of these folders' files of these kinds.
CODE = ("megatron_dynmoe", "benchmarks", "launch", "tests")
KINDS = (".py", ".toml", ".flags", ".sh", ".env")
MAX_TRIES = 2
BEGUN, DONE, FAILED, CUT = "begun", "done", "failed", "cut"


@dataclass
class Record:
    """What became of a stage.

    Attributes:
        state: ``begun`` (and its call was killed, if it stays so), ``done``, ``failed`` (by its own
            fault), ``cut`` (the call had to end).
        why: in a line, if it is not done.
        seconds: how long it ran, the last time.
        tries: how often it was begun and not cut.
    """

    state: str = BEGUN
    why: str = ""
    seconds: float = 0.0
    tries: int = 0


@dataclass
class State:
    """One code's run on one kind of device.

    Attributes:
        device: its name, or ``rehearsal``.
        calls: of each call when it began, its minutes, its seconds, and how it ended.
    """

    folder: Path
    commit: str
    code: str
    device: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path, commit: str, code: str, device: str) -> State:
        """The run under the state's folder, a new one if there is none."""
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        folder = root / "runs" / f"{name}-{code}"
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        try:
            return cls.read(folder, (folder / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(folder, commit, code, device)

    @classmethod
    def read(cls, folder: Path, text: str) -> State:
        """From state.json's text.

        Raises:
            ValueError: it is something else.
        """
        try:
            fields = json.loads(text)
            records = {name: Record(**record) for name, record in fields.pop("records").items()}
            return cls(folder, **fields, records=records)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder / 'state.json'}: {error}") from error

    def save(self) -> None:
        """Write it; whatever ends this process, the old file or the new one is there."""
        fields = asdict(self)
        del fields["folder"]
        text = json.dumps(fields, indent=1)
        replace_file(self.folder / "state.json", lambda path: path.write_text(text))

    def stage_folder(self, name: str) -> Path:
        return self.folder / "stages" / name

    def begin(self, name: str) -> Path:
        """Note that a stage begins; returns its folder, empty."""
        record = self.records.setdefault(name, Record())
        record.state, record.why, record.tries = BEGUN, "", record.tries + 1
        self.save()
        shutil.rmtree(self.stage_folder(name), ignore_errors=True)
        self.stage_folder(name).mkdir(parents=True)
        return self.stage_folder(name)

    def end(self, name: str, state: str, why: str, seconds: float) -> None:
        record = self.records[name]
        record.state, record.why, record.seconds = state, why, seconds
        if state == CUT:
            record.tries -= 1
        self.save()

    def pending(self, stages: Sequence[Stage]) -> list[Stage]:
        """What is left, in its order; what has failed, or was begun when a call was killed, last.

        What failed twice is not tried again.
        """

        def is_trouble(stage: Stage) -> bool:
            return self.records.get(stage.name, Record(CUT)).state in (BEGUN, FAILED)

        left = [
            stage
            for stage in stages
            if (record := self.records.get(stage.name, Record())).state != DONE
            and record.tries < MAX_TRIES
        ]
        return sorted(left, key=is_trouble)


def adopt(state: State, archive: Path, any_code: bool) -> list[str]:
    """Take over what an earlier call has finished, from its archive; returns the stages' names.

    Args:
        any_code: take it also if it is of another code or device.

    Raises:
        ValueError: the file is no such archive, or of another code or device.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            member = tar.extractfile("state.json")
            assert member is not None
            earlier = State.read(archive, member.read().decode())
            for what in ("code", "device"):
                ours, theirs = getattr(state, what), getattr(earlier, what)
                if ours != theirs and not any_code:
                    raise ValueError(
                        f"is of another {what} ({theirs}; here: {ours}), commit {earlier.commit}: "
                        "leave it out, or take it all the same with ANY_CODE=1 (--any-code)"
                    )
            taken = [
                name
                for name, record in earlier.records.items()
                if record.state in (DONE, FAILED)
                and state.records.get(name, Record()).state != DONE
            ]
            for name in taken:
                inside = [m for m in tar.getmembers() if m.name.startswith(f"stages/{name}/")]
                with new_folder(state.stage_folder(name), overwrite=True) as folder:
                    for member_info in inside:
                        member_info.name = member_info.name.removeprefix(f"stages/{name}/")
                        tar.extract(member_info, folder, filter="data")
                state.records[name] = earlier.records[name]
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError, AssertionError) as error:
        said = "holds no state.json" if isinstance(error, KeyError) else error
        raise ValueError(f"--resume-from {archive}: {said}") from error
    state.calls = [call for call in earlier.calls if call not in state.calls] + state.calls
    state.save()
    return taken


def lock(root: Path, patience: float = 15) -> int:
    """Wait for a call that is just ending, and keep others out; returns the file descriptor.

    Raises:
        ValueError: another call is at work.
    """
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT)
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(descriptor)
                raise ValueError(
                    f"another call is at work in {root}: wait for it, or name another STATE"
                ) from None
        time.sleep(0.1)


def code(parts: Sequence[str] = CODE) -> str:
    """A hash of the code that is in these folders."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((ROOT / part).rglob("*")):
            if path.suffix in KINDS and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit(pack: Path) -> str:
    """The commit that is checked out, or that a pack was made of, where there is no history."""
    if named := os.environ.get("BENCHMARK_COMMIT"):
        return named
    named = fingerprint.commit() if shutil.which("git") else "unknown"
    if named == "unknown" and (pack / "commit").exists():
        return (pack / "commit").read_text().strip()
    return named
