"""Reads the values of a run from the event files that it wrote for TensorBoard.

The values come from :mod:`megatron_dynmoe.runs.metrics` and from Megatron. Runs under way can be
read, too, and those that were cut off or resumed.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dynmoe.runs import metric_names as names
from megatron_dynmoe.runs.folder import EVENT_FILES, RESOLVED, TENSORBOARD, has_events
from megatron_dynmoe.settings.distribution import parse_target
from megatron_dynmoe.settings.messages.command_line import UsageError


class NothingLogged(ValueError):
    """The run has not logged a step yet."""


class Series(NamedTuple):
    """One scalar over a run: iterations and values, and wall-clock times in seconds."""

    iterations: list[int]
    values: list[float]
    times: list[float]


def read_scalars(run_dir: Path, elsewhere: Path | None = None) -> dict[str, Series]:
    """Read all scalars of a run, as the last of its starts left them.

    If a run resumes from a checkpoint before its last step, it makes void whatever was logged
    after that checkpoint.

    Args:
        run_dir: the folder given as ``--run-dir``.
        elsewhere: the folder of the events (``--tensorboard-dir``), if it is another.

    Raises:
        NothingLogged: there are no event files.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_dir / TENSORBOARD
    if elsewhere is not None and not has_events(folder):
        folder = elsewhere
    if not has_events(folder):
        raise NothingLogged(
            f"{folder} holds no event files: give the folder of a run that was started with "
            "--run-dir and has logged a step."
        )
    files = [
        EventAccumulator(str(path), size_guidance={"scalars": 0})
        for path in folder.glob(EVENT_FILES)
    ]
    for file in files:
        file.Reload()
    # A start that is killed at once leaves an empty file, or one without a scalar.
    files = [file for file in files if file.Tags()["scalars"]]
    # This is the order of the starts. TensorBoard sorts by name, which cannot order the files of
    # one second.
    files.sort(key=EventAccumulator.FirstEventTimestamp)
    by_tag: dict[str, list[Any]] = {}
    for file in files:
        for tag in file.Tags()["scalars"]:
            by_tag.setdefault(tag, []).extend(file.Scalars(tag))
    trained = [event.wall_time for event in by_tag.get(names.LOSS, [])]
    scalars = {}
    for tag, events in by_tag.items():
        kept = _drop_undone_steps(events, trained if "validation" in tag else None)
        scalars[tag] = Series(
            [event.step for event in kept],
            [event.value for event in kept],
            [event.wall_time for event in kept],
        )
    return scalars


def _drop_undone_steps(events: list[Any], trained: list[float] | None) -> list[Any]:
    """The events of one scalar without those that a later start trained again.

    Args:
        events: in the order in which they were written.
        trained: only for a scalar of evaluation: the times at which training logged a step. If an
            evaluation goes back, but training logged no step since the one before it, it comes
            from the test set, which Megatron logs under the same name, or from ``--skip-train``;
            it is left out.
    """
    kept: list[Any] = []
    for event in events:
        if kept and event.step <= kept[-1].step and trained is not None:
            steps_before = bisect_right(trained, kept[-1].wall_time)
            if steps_before == bisect_right(trained, event.wall_time):
                continue
        while kept and kept[-1].step >= event.step:
            kept.pop()
        kept.append(event)
    return kept


def read_run(run_dir: Path) -> tuple[dict[str, Any], dict[str, Series]]:
    """The resolved settings and the scalars of a run, which may still be under way.

    Raises:
        UsageError: the folder is not a run's.
        NothingLogged: the run has not logged a step yet.
    """
    resolved_file = run_dir / RESOLVED
    if not resolved_file.is_file():
        reason = f"it holds no {RESOLVED}" if run_dir.is_dir() else "there is no such folder"
        raise UsageError(
            f"{run_dir} is not the folder of a run: {reason}. Give the folder that training was "
            "given as --run-dir."
        )
    import yaml  # a benchmark on a bare machine imports this module and reads no run

    resolved = yaml.safe_load(resolved_file.read_text())
    named = resolved.get("megatron", {}).get("tensorboard_dir")
    scalars = read_scalars(run_dir, Path(named) if named else None)
    if names.LOSS not in scalars:
        raise NothingLogged(f"{run_dir} has not logged a step yet: wait for its first log line.")
    return resolved, scalars


def target_of(routing: dict[str, Any], scalars: dict[str, Series]) -> Series | None:
    """The target experts per token as it was at each logged step; None without a target.

    The settings know only the target of the last start. They are used only for runs that logged
    no target, such as those of version 0.1.0.
    """
    if "target_experts_per_token" not in routing:
        return None
    if names.TARGET in scalars:
        return scalars[names.TARGET]
    schedule, loss = parse_target(routing["target_experts_per_token"]), scalars[names.LOSS]
    return loss._replace(values=[schedule.at_step(iteration) for iteration in loss.iterations])


def layers(scalars: dict[str, Series], quantity: str) -> dict[int, Series]:
    """The series of a quantity by layer number, bottom first; only layers with experts."""
    pattern = names.of_any_layer(quantity)
    found = {int(match[1]): scalars[tag] for tag in scalars if (match := pattern.fullmatch(tag))}
    return dict(sorted(found.items()))
