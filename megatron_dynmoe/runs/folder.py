"""The names of the files in a run's folder, and the marks of its state."""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_dynmoe.storage.atomic import replace_file

TENSORBOARD = "tensorboard"

EVENT_FILES = "events.out.tfevents.*"

RESOLVED = "resolved.yaml"

SUMMARY = "summary.json"

CURVES = "curves.png"


def has_events(folder: Path) -> bool:
    """Whether TensorBoard's events of a run are in a folder."""
    return any(folder.glob(EVENT_FILES))


def has_scalars(event_file: Path) -> bool:
    """Whether a file holds the values of at least one step or evaluation."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = EventAccumulator(str(event_file), size_guidance={"scalars": 1})
    file.Reload()
    return bool(file.Tags()["scalars"])


ATTEMPTS, FINISHED, STOPPED = "attempts", "finished.json", "stopped.txt"


def mark_finished(run_dir: Path, train_iters: int | None, train_samples: int | None) -> None:
    """Note that a run has reached its end."""
    done = {"train-iters": train_iters, "train-samples": train_samples}
    replace_file(run_dir / FINISHED, lambda partial: partial.write_text(json.dumps(done) + "\n"))


def mark_stopped(signal_name: str) -> None:
    """If this process belongs to an attempt, note that a signal told it to end."""
    if "ATTEMPT" in os.environ:
        (Path(os.environ["ATTEMPT"]) / STOPPED).write_text(signal_name + "\n")
