#!/usr/bin/env python3
"""Writes those tables of the docs that are made from code.

    python tools/generate_docs.py

A test compares the files with what this would write.
"""

import csv
import re
import sys
from pathlib import Path

# A clone works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_dynmoe.conversion.formats import FORMATS, OURS
from megatron_dynmoe.runs.metric_names import MEANINGS
from megatron_dynmoe.settings.config import SETTINGS
from megatron_dynmoe.settings.messages.command_line import CommandParser
from megatron_dynmoe.settings.routings import DYNAMIC, RoutingSettings
from megatron_dynmoe.settings.upstream_flags import (
    UNRELEASED,
    UPSTREAM_FLAGS,
    Ignored,
    Refused,
    Works,
)

PHASES = ("forward", "backward", "optimizer")  # of a step
DOCS = Path(__file__).resolve().parent.parent / "docs"

CONFIGURATION = """\
# Configuration

Written by `tools/generate_docs.py` from `megatron_dynmoe/settings/config.py` and, for the defaults,
`routings.py` beside it: change it there.

Every setting is a flag of `python -m megatron_dynmoe.pretrain` and a line of the YAML file that the
environment variable `DYNMOE_CONFIG` names. A flag overrides the file. The file is how Megatron's
own `pretrain_gpt.py` gets its settings, with `--spec megatron_dynmoe.specs dynmoe_layer_spec`:

```yaml
routing: dtop_p
target_experts_per_token: 2
```

A setting that is left out has the default of the routing. The run stops at start-up if the routing
does not have a given setting, if a value is out of range, or if two settings contradict each other.

A schedule is a number, or `ITERATION:TARGET,...` with increasing iterations, linear in between and
constant outside: `0:8,1000:2` goes from 8 experts to 2 in the first thousand steps.

Megatron's `--moe-router-load-balancing-type` and `--moe-aux-loss-coeff` can also set the
load-balance loss. [upstream_flags.md](upstream_flags.md) lists which other flags of Megatron work
here.

"""

UPSTREAM = """\
# Megatron's MoE flags with dynamic routing

Written by `tools/generate_docs.py` from `megatron_dynmoe/settings/upstream_flags.py`: change it
there. A test fails when Megatron has a setting that is not in the table. With
`--moe-dynamic-routing top_k` nothing is refused: that is stock Megatron.

A refused flag stops the run at start-up if it is used, that is, if its value differs from the one
given here.

| setting | with dynamic routing | remark |
| --- | --- | --- |
"""

# A page of prose has its table between two such lines.
TABLE = r"(<!-- {}: .*? -->).*?(<!-- end of {} -->)"


def configuration() -> str:
    """The text of docs/configuration.md."""
    rows = []
    for name, setting in SETTINGS.items():
        value = (
            ", ".join(f"`{choice}`" for choice in setting.choices)
            or {
                "int": "whole number",
                "float": "number",
                "float_or_auto": "number or `auto`",
                "schedule": "schedule",
            }[setting.kind]
        )
        defaults = [_default(name, kind) for kind in DYNAMIC.values()]
        flag = "--moe-dynamic-" + name.replace("_", "-")
        rows.append(f"| `{name}`<br>`{flag}` | {value} | {' | '.join(defaults)} | {setting.help} |")
    head = f"| setting and flag | value | {' | '.join(f'`{name}`' for name in DYNAMIC)} | meaning |"
    line = "|" + " --- |" * (len(DYNAMIC) + 3)
    return CONFIGURATION + "\n".join([head, line, *rows]) + "\n"


def _default(name: str, kind: RoutingSettings) -> str:
    if name == "routing":
        return ""
    if name in kind.required:
        return "required"
    return f"`{kind.defaults[name]}`" if name in kind.defaults else "-"


def upstream_flags() -> str:
    """The text of docs/upstream_flags.md."""
    rows = []
    for name, entry in UPSTREAM_FLAGS.items():
        match entry:
            case Works(note):
                status, remark = "works", note
            case Ignored(note):
                status, remark = "ignored", note
            case Refused(unused, reason, remedy):
                values = " or ".join(f"`{value}`" for value in unused)
                status, remark = f"refused unless {values}", f"{reason}; remedy: {remedy}"
        if name in UNRELEASED:
            remark += " (on Megatron's main branch)"
        rows.append(f"| `{name}` | {status} | {remark} |")
    return UPSTREAM + "\n".join(rows) + "\n"


def benchmarks() -> str:
    """The text of docs/benchmarks.md: what it says now, with the table of the kernels' least times.

    It needs Triton.
    """
    from benchmarks.kernel_rooflines import table

    return with_tables("benchmarks.md", {"kernel rooflines": table()})


def testing() -> str:
    """The text of docs/testing.md: what it says now, with the table of planted mistakes."""
    from tests.mutations.planted import MUTATIONS

    rows = ["| mistake | file | test |", "| --- | --- | --- |"]
    for mutation in MUTATIONS:
        test = mutation.tests[0].removeprefix("tests/")
        rows.append(f"| {mutation.mistake} | `{mutation.file}` | `{test}` |")
    return with_tables("testing.md", {"planted mistakes": rows})


def extending() -> str:
    """The text of docs/extending.md: what it says now, with the example of a rule."""
    source = (DOCS.parent / "tests/moe/min_p.py").read_text(encoding="utf-8")
    return with_tables("extending.md", {"min-p": ["```python", *source.splitlines(), "```"]})


def monitoring() -> str:
    """The text of docs/monitoring.md: what it says now, with the table of metrics."""
    rows = ["| name | meaning |", "| --- | --- |"]
    rows += [f"| `{name}` | {meaning} |" for name, meaning in MEANINGS.items()]
    return with_tables("monitoring.md", {"metrics": rows})


def huggingface() -> str:
    """The text of docs/huggingface.md: what it says now, with the tables of formats and budgets."""
    from study import budgets
    from study.parts import read_rows

    names = (f"`{name}`{' (default)' * (format is OURS)}" for name, format in FORMATS.items())
    rows = [f"| | {' | '.join(names)} |", "|" + " --- |" * (len(FORMATS) + 1)]
    for line in OURS.column:
        cells = " | ".join(format.column[line] for format in FORMATS.values())
        rows.append(f"| {line} | {cells} |")
    of_budgets = budgets.table(read_rows(budgets.PART.results))
    return with_tables("huggingface.md", {"formats": rows, "budgets": of_budgets})


def planning() -> str:
    """The text of docs/planning.md: what it says now, with the table of dry runs."""
    with (DOCS.parent / "benchmarks/results/dry_runs.csv").open(newline="") as file:
        found = {(row["run"], row["kernels"]): row for row in csv.DictReader(file)}
    head = ["run", "GPUs", *PHASES, "planner", "", "waits", "of a step", "kernels"]
    head += ["with Triton's", "sent, GB"]
    rows = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for (name, kernels), row in found.items():
        if kernels == "0":
            fused = found.get((name, "1"), {}).get("kernels_of_a_layer")
            cells = (
                name,
                row["gpus"],
                *(f"{float(row[f'{phase}_gb']):.3g}" for phase in PHASES),
                f"{float(row['planner_gb']):.3g}",
                f"{float(row['planner_over']):+.1%}",
                f"{float(row['waits_of_a_layer']):g}",
                f"{float(row['waits_of_a_step']):,.0f}",
                f"{float(row['kernels_of_a_layer']):,.0f}",
                f"{float(fused):,.0f}" if fused else "",
                f"{float(row['sent_gb']):.3g}",
            )
            rows.append(f"| {' | '.join(cells)} |")
    return with_tables("planning.md", {"dry runs": rows})


def diffusion() -> str:
    """The text of docs/diffusion.md: what it says now, with the tables of finished runs."""
    from study.diffusion import ROWS, table
    from study.parts import read_rows

    return with_tables("diffusion.md", {"routings": table(read_rows(ROWS))})


def study() -> str:
    """The text of docs/study.md, from the results of the study and of its parts."""
    from study import document
    from study.results import RESULTS, Results

    return document.text(Results.read(RESULTS / f"{document.SIZE}.json"))


def with_tables(page: str, tables: dict[str, list[str]]) -> str:
    """The text of a page with these rows as its tables of those names."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, rows in tables.items():
        table = "\n\n" + "\n".join(rows) + "\n\n"
        place = re.compile(TABLE.format(name, name), re.DOTALL)
        text, found = place.subn(lambda marks, table=table: marks[1] + table + marks[2], text)
        if found != 1:
            raise ValueError(f"docs/{page} has {found} places for the table of {name}, not one")
    return text


DOCUMENTS = {
    "benchmarks.md": benchmarks,
    "configuration.md": configuration,
    "diffusion.md": diffusion,
    "extending.md": extending,
    "huggingface.md": huggingface,
    "monitoring.md": monitoring,
    "planning.md": planning,
    "study.md": study,
    "testing.md": testing,
    "upstream_flags.md": upstream_flags,
}

if __name__ == "__main__":
    CommandParser(description=__doc__).parse_args()
    for name, text in DOCUMENTS.items():
        (DOCS / name).write_text(text(), encoding="utf-8")
