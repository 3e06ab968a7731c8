"""What docs/study.md says of the parts: which there are, how far each is, and its table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from study import (
    budgets,
    diffusion,
    experts,
    granularity,
    influences,
    rules,
    settings,
    size,
    tokens,
)  # fmt: skip
from study.axes import Leads, in_words, leads
from study.claims import FAILS, HOLDS, UNCLEAR
from study.parts import Part, Rows, prose, read_rows, run_names
from study.results import NOT_CLEAR, RESULTS, Results
from study.tables import paragraph

SCALING = (granularity.PART, experts.PART, size.PART, tokens.PART)
PARTS = (rules.PART, budgets.PART, *SCALING, settings.PART, influences.PART)
NAMES = (*(part.name for part in PARTS), "diffusion")  # of modules that are run
_PLACES = {
    "rules": "#rules-at-equal-counts",
    "budgets": "huggingface.md#budgets",
    "diffusion": "diffusion.md#three-routings-at-equal-compute",
}
_HOW_TO_READ = (
    "In the sections that follow, the lead of DTop-p is the held-out loss of top-k less that of "
    "DTop-p, with the same mean number of experts and the same seeds. Its interval is made as that "
    "above; it takes the noise to be the same for all models."
)


def all_parts() -> str:
    """A list of the parts: what each asks, and how many of its runs have been trained."""
    lines = ["| `PART=` | what it trains | runs trained | |", "| --- | --- | --- | --- |"]
    for part in PARTS:
        where = _PLACES.get(part.name, f"#{part.name}")
        lines.append(_line(part.name, part.about, read_rows(part.results), part.run_names, where))
    rows, names = read_rows(diffusion.ROWS), run_names(diffusion.VARIANTS)
    lines.append(_line("diffusion", diffusion.__doc__, rows, names, _PLACES["diffusion"]))
    return "\n".join(lines)


def of_parts(results: Results | None, folder: Path = RESULTS) -> list[str]:
    """The lines of a section for each part of this page that has a row."""
    of_axes = [line for axis in SCALING for line in of_part(axis, results, folder)]
    how_to_read = ["", paragraph(_HOW_TO_READ)] if of_axes else []
    if known_leads(results, folder):
        how_to_read += ["", "![Lead of DTop-p along each axis](images/study_leads.png)"]
        how_to_read += ["", "Hollow: a point that is not part of the trend."]
    others = (of_part(part, results, folder) for part in (settings.PART, influences.PART))
    return [*how_to_read, *of_axes, *(line for lines in others for line in lines)]


def known_leads(results: Results | None, folder: Path = RESULTS) -> dict[str, Leads]:
    """The leads of DTop-p along each axis that has two points or more, by the axis' name."""
    found = {axis.name: leads(axis.points, axis.all_rows(folder), results) for axis in SCALING}
    return {name: of_axis for name, of_axis in found.items() if len(of_axis) > 1}


def of_part(part: Part, results: Results | None, folder: Path = RESULTS) -> list[str]:
    """The lines of the section of a part; none before its first row."""
    if not (own := read_rows(folder / part.results.name)):
        return []
    return [
        *("", f"### {part.name.capitalize()}", ""),
        *(paragraph(" ".join(prose(part.about))), ""),
        *(paragraph(status(part, own)), ""),
        *part.table(part.all_rows(folder), results),
    ]


def claims(results: Results | None, folder: Path = RESULTS) -> list[list[str]]:
    """The cells of what DTop-p's authors claim and parts test, as in :mod:`study.claims`."""
    lines = rules.claims(rules.PART.all_rows(folder), results)
    for axis in SCALING:
        if axis.claim is None:
            continue
        trend = axis.trend(axis.all_rows(folder), results)
        saw, word = f"waits for `PART={axis.name}`", ""
        if trend is not None:
            saw, word = in_words(trend), trend.slope.verdict(FAILS, HOLDS)
            word = UNCLEAR if word == NOT_CLEAR else word
        lines.append(["DTop-p", *axis.claim, saw, word])
    return lines


def status(part: Part, rows: Rows) -> str:
    """Which runs of a part have been trained, and which wait."""
    num_trained = _num_trained(part.run_names, rows)
    if num_trained == part.num_runs:
        trained = f"All {num_trained} runs of `PART={part.name}` have been trained."
        return f"{trained} {_commits(rows)}"
    waiting: dict[tuple[int, ...], list[str]] = {}
    for name, variant in part.variants.items():
        seeds = range(1, variant.num_seeds + 1)
        if missing := tuple(seed for seed in seeds if f"{name}-seed{seed}" not in rows):
            waiting.setdefault(missing, []).append(f"`{name}`")
    trained = f"{num_trained} of the {part.num_runs} runs of `PART={part.name}`"
    these = "; ".join(f"{_and(names)} ({_seeds(seeds)})" for seeds, names in waiting.items())
    verb = "has" if num_trained == 1 else "have"
    return f"{trained} {verb} been trained. These wait: {these}. {_commits(rows)}"


def _commits(rows: Rows) -> str:
    """Which code trained the rows."""
    counted = Counter(
        commit[:7] + "+" * commit.endswith("+")  # git shortens to more digits, too
        for commit in (row["commit"] for row in rows.values() if "commit" in row)
    )
    if not counted:
        return ""
    named = [f"{commit} ({number})" for commit, number in counted.most_common()]
    plus = "; + is for changes that were not committed" if "+" in "".join(counted) else ""
    return f"Code: commit {', '.join(named)}{plus}."


def _num_trained(names: Sequence[str], rows: Rows) -> int:
    return sum(name in rows for name in names)


def _line(name: str, about: str | None, rows: Rows, names: Sequence[str], where: str) -> str:
    question, *_ = prose(about)
    found = f"[table]({where})" if rows else "waits"
    return f"| `{name}` | {question} | {_num_trained(names, rows)} of {len(names)} | {found} |"


def _seeds(numbers: Sequence[int]) -> str:
    return f"{'seed' if len(numbers) == 1 else 'seeds'} {_and([str(one) for one in numbers])}"


def _and(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
