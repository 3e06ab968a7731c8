"""What a person reads in a minute: what agrees, what failed, how fast, how large, what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.gpu_first.outcome import rows_of
from benchmarks.gpu_first.stages import Stage
from benchmarks.gpu_first.state import BEGUN, CUT, DONE, FAILED, Record, State

Row = dict[str, str]
MAX_FAILURES = 12
OURS = "ours"
REHEARSAL = (
    "**This is a rehearsal on a CPU, at sizes of seconds.** It shows that the stages run and what "
    "comes out of them. Its figures say nothing about a GPU, and little about a CPU."
)
WORDS = {BEGUN: "its call was killed", FAILED: "failed", CUT: "cut short"}


class Again(NamedTuple):
    """The commands that go on: here, and on a machine that knows nothing of this one."""

    here: str
    elsewhere: str


def write(state: State, stages: Sequence[Stage], again: Again, running: str = "") -> str:
    """The summary as Markdown.

    Args:
        running: the stage that runs, while one does.
    """
    rows = {stage.name: rows_of(state.stage_folder(stage.name)) for stage in stages}
    records = {stage.name: state.records.get(stage.name) for stage in stages}
    parts = [
        _title(state, stages, running),
        _table(stages, records, rows, running),
        _layer_table(rows.get("layers", [])),
        _training(stages, rows, rehearses=state.device == "rehearsal"),
        _failures(stages, records, rows),
    ]
    left = state.pending(stages)
    if left or running:
        names = ", ".join(f"`{stage.name}`" for stage in left)
        parts.append(
            f"## To go on\n\nLeft: {names}. On this machine, and on another one with this call's "
            f"archive:\n\n    {again.here}\n    {again.elsewhere}"
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(state: State, stages: Sequence[Stage], running: str) -> str:
    states = [state.records.get(stage.name, Record(CUT)).state for stage in stages]
    counts = f"{states.count(DONE)} of {len(stages)} stages are done"
    failed = states.count(FAILED) + states.count(BEGUN) - bool(running)
    counts += f", {failed} failed" if failed else ""
    rehearses = state.device == "rehearsal"
    calls = [
        f"{call['begun']}: {call['seconds']:.0f} s of {call['minutes']:g} min, {call['ended']}"
        for call in state.calls
    ]
    lines = [
        f"# First minutes on {'a CPU, a rehearsal' if rehearses else state.device}: {counts}",
        REHEARSAL if rehearses else "",
        f"Commit {state.commit}, code {state.code}. Calls: {'; '.join(calls)}."
        + (f" **`{running}` is running.**" if running else ""),
    ]
    return "\n\n".join(line for line in lines if line)


def _table(
    stages: Sequence[Stage],
    records: dict[str, Record | None],
    rows: dict[str, list[Row]],
    running: str,
) -> str:
    lines = ["| stage | what | outcome | s |", "| --- | --- | --- | --- |"]
    for stage in stages:
        record = records[stage.name]
        if record is None:
            outcome, seconds = "not reached", ""
        else:
            outcome, seconds = _outcome(stage, record, rows[stage.name]), f"{record.seconds:.0f}"
        if stage.name == running:
            outcome, seconds = "running", ""
        lines.append(f"| `{stage.name}` | {stage.asks} | {_cell(outcome)} | {seconds} |")
    return "\n".join(lines)


def _outcome(stage: Stage, record: Record, rows: list[Row]) -> str:
    rows = [row for row in rows if row["file"] == stage.writes]
    good = [row for row in rows if not row.get("failed")]
    try:
        said = READERS[stage.kind](good) if stage.kind in READERS and good else ""
    except (KeyError, ValueError, StopIteration):  # rows of an unfinished file
        said = ""
    if len(good) < len(rows):
        lacks = f"**{len(rows) - len(good)} of {len(rows)} failed**"
        said = f"{lacks}; {said}" if said else lacks
    if record.state == DONE:
        return said or "done"
    trouble = f"**{WORDS[record.state]}**" if record.state != CUT else WORDS[CUT]
    return f"{trouble}: {said or record.why}" if said or record.why else trouble


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# --- a line of each kind of rows -----------------------------------------------------------------


def _agree(rows: list[Row]) -> str:
    wrong = [row for row in rows if row["agrees"] != "yes"]
    if wrong:
        first = f"{wrong[0]['workload']}, {wrong[0]['quantity']}"
        return f"**{len(wrong)} of {len(rows)} quantities differ**, first {first}"
    worst = max(float(row["error_ratio"]) for row in rows if row["error_ratio"])
    return f"all {len(rows)} quantities agree; errors are up to {worst:.2f} times plain PyTorch's"


def _select(rows: list[Row]) -> str:
    ours = [row for row in rows if row["provider"] == OURS and row.get("median_ratio_to_stock")]
    ratios = [float(row["median_ratio_to_stock"]) for row in ours]
    return f"ours takes {_range(ratios)} of stock's time in {len(ratios)} cases" if ratios else ""


def _layers(rows: list[Row]) -> str:
    ratios = [
        f"{_ratio(row)} ({row['workload'].partition(':')[0]})"
        for row in rows
        if row["provider"] == OURS and row.get("speed_ratio")
    ]
    return f"ours is {', '.join(ratios)} times as fast as stock" if ratios else ""


def _ratio(row: Row) -> str:
    return row["speed_ratio"].partition(" ")[0]


def _train(rows: list[Row]) -> str:
    row = next(row for row in rows if row.get("median_s"))
    return f"{float(row['median_s']):.3g} s a step, {float(row['experts_per_token']):.2f} experts"


def _memory(rows: list[Row]) -> str:
    return f"{_range([float(row['predicted_gb']) for row in rows])} GB"


def _tests(rows: list[Row]) -> str:
    outcomes = [row["outcome"] for row in rows]
    counts = [(name, outcomes.count(name)) for name in ("passed", "failed", "skipped")]
    return ", ".join(f"{count} {name}" for name, count in counts if count)


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


READERS: dict[str, Callable[[list[Row]], str]] = {
    "agree": _agree,
    "select": _select,
    "layers": _layers,
    "train": _train,
    "memory": _memory,
    "tests": _tests,
}


# --- the layers and the training steps side by side ----------------------------------------------


def _layer_table(rows: list[Row]) -> str:
    """How fast each provider is, by workload."""
    measured = [row for row in rows if row.get("both_ms")]
    workloads = dict.fromkeys(row["workload"] for row in measured)
    if not workloads:
        return ""
    cells = {
        (row["provider"], row["workload"]): f"{row['both_ms']} ms, {_ratio(row) or '?'}"
        for row in measured
    }
    lines = [
        "## One layer",
        "",
        "Forward and backward, and how many times as fast as stock top-k on `local`:",
        "",
        f"| | {' | '.join(workload.partition(',')[0] for workload in workloads)} |",
        f"| --- {'| --- ' * len(workloads)}|",
    ]
    for provider in dict.fromkeys(row["provider"] for row in measured):
        values = [cells.get((provider, workload), "") for workload in workloads]
        lines.append(f"| {provider} | {' | '.join(values)} |")
    return "\n".join(lines)


BASE = "train-top2"


def _training(stages: Sequence[Stage], rows: dict[str, list[Row]], rehearses: bool) -> str:
    """The measured steps: their speed against top-2, their memory against the prediction.

    A rehearsal measures what a process holds of the CPU's memory, which nothing predicts.
    """
    steps = {
        stage.name: row
        for stage in stages
        if stage.kind == "train"
        for row in rows[stage.name]
        if row.get("median_s")
    }
    if not steps:
        return ""
    predicted = {row["predicts"]: row for row in rows.get("memory", [])}
    lines = [
        "## Training steps",
        "",
        "| stage | s a step | tokens/s | of the ceiling | times as fast as top-2 | peak, GB | "
        "predicted, GB | measured / predicted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in steps.items():
        speed = (
            f"{float(steps[BASE]['median_s']) / float(row['median_s']):.3f}"
            if BASE in steps
            else ""
        )
        peak, expected = row.get("peak_memory_gb", ""), predicted.get(name, {})
        gigabytes = expected.get("predicted_gb", "")
        ratio = ""
        if peak and gigabytes and not rehearses:
            ratio = f"{float(peak) / float(gigabytes):.3f}"
        lines.append(
            f"| `{name}` | {row['median_s']} | {row['tokens_per_s']} | {row['of_ceiling']} | "
            f"{speed} | {peak} | {gigabytes} | {ratio} |"
        )
    return "\n".join(lines)


# --- failures ------------------------------------------------------------------------------------


def _failures(
    stages: Sequence[Stage], records: dict[str, Record | None], rows: dict[str, list[Row]]
) -> str:
    """Stages that failed, providers that failed within a stage, and tests."""
    lines = []
    for stage in stages:
        record = records[stage.name]
        if record is not None and record.state == FAILED:
            lines.append(f"- `{stage.name}`: {record.why}")
        for row in rows[stage.name]:
            if row.get("failed"):
                lines.append(f"- `{stage.name}`, {row['provider']}: {row['failed']}")
            elif row.get("outcome") == "failed":
                lines.append(f"- `{row['test']}`: {row['message']}")
    if not lines:
        return ""
    more = len(lines) - MAX_FAILURES
    lines = lines[:MAX_FAILURES] + ([f"- and {more} more: rows.csv"] if more > 0 else [])
    return "\n".join(
        ["## What failed", "", *lines, "", "The logs are in archive.tar.gz: stages/NAME/log.txt."]
    )
