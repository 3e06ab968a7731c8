"""docs/study.md and its pictures from the results, so that no figure is typed by hand."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from study import tables
from study.claims import CLAIMS, judge
from study.fingerprint import ROOT
from study.results import Results
from study.variants import SIZES, TARGET, VARIANTS, Size

DOCUMENT, IMAGES = ROOT / "docs" / "study.md", ROOT / "docs" / "images"
RESULTS = ROOT / "study" / "results"
SIZE = "cpu"  # the size that the document is about

_INTRODUCTION = """\
# The papers' claims, in small

Written by `python -m study document` from `study/results/{size}.json`; a test compares the two.

`make study` trains the routings of both papers on the same text with the same model, steps and
seeds, and looks at what each paper claims. It is small: 6 layers of hidden size 128 with 16 experts
of 256, {steps} steps of {tokens_per_step:,} tokens, a text of a few megabytes. What holds here may
not hold at the papers' sizes, and the other way round.

    make study                             # at most 4 hours on 2 cores; again: goes on where it was
    nohup make study > study.log &         # in the background; kill %1 has it save and end
    make study STUDY="--list"              # what is trained, and how far it is
    make study STUDY="--quick"             # does everything work? A few minutes, no results
    make study STUDY="--only dtop_p top2 --tokens-scale 0.5"
    make study-gpu STUDY="--text mine.jsonl.gz"    # larger, on one GPU, on text of your own

Trainings run {jobs} at a time, one thread each. Ctrl-C or SIGTERM has them save and end; the same
command goes on from there, and after a crash from the last checkpoint. A run is not trained again
while its flags, its text and the code that trains are the same (comments and docstrings do not
count); `--any-code` takes finished runs of other code, too. Folders are in `runs/study`;
`python tools/plot_run.py runs/study/dtop_p-seed1-* runs/study/top2-seed1-*` lays runs over each
other.

The size for a GPU ({gpu}) has not been run yet.

## What is compared

{variants}

Text: the files of `examples/data`; the last 5 % of each file's documents are held out, and are what
is evaluated. Balance loss per sequence with 1e-2 in all variants (top-2: 2e-2, since Megatron
divides by k), also in DTop-p, whose authors take 1e-4 for a larger model. The seed sets the
initialisation and the order of the text. The dense model's MLP is as wide as two experts.
"""

_NOT_RUN = """
## Results

**The full study has not been run yet**, so there are no figures here. `make study` runs it and
writes them into this page.
"""


def write(results: Results | None) -> list[Path]:
    """Write the page, and with results the pictures; returns what was written."""
    written = [DOCUMENT]
    if results is not None:
        from study.figures import draw_all

        written += draw_all(results, IMAGES)
    DOCUMENT.write_text(text(results), encoding="utf-8")
    return written


def text(results: Results | None) -> str:
    """The text of docs/study.md."""
    size = SIZES[SIZE]
    page = _INTRODUCTION.format(
        size=SIZE,
        steps=size.steps,
        tokens_per_step=size.tokens_per_step,
        jobs=size.jobs,
        gpu=_describe(SIZES["gpu"]),
        variants=_variants(),
    )
    if results is None:
        return page + _NOT_RUN + _claims(None)
    return page + _results(results) + _claims(results)


def _describe(size: Size) -> str:
    tokens = size.steps * size.tokens_per_step
    return f"{size.steps} steps of {size.tokens_per_step:,} tokens, {tokens / 1e6:.0f} M in all"


def _variants() -> str:
    rows = ["| name | routing | seeds | flags |", "| --- | --- | --- | --- |"]
    for variant in VARIANTS.values():
        flags = variant.flags.format(twice_ffn=2 * SIZES[SIZE].ffn)
        rows.append(
            f"| `{variant.name}` | {variant.title} | {variant.num_seeds} | `{flags.strip()}` |"
        )
    return "\n".join(rows)


def _results(results: Results) -> str:
    content = results.content
    spread = results.spread("validation_loss")
    commits = sorted({row["commit"] for row in content["runs"]})
    missing = [
        name
        for name, variant in VARIANTS.items()
        if len(results.rows.get(name, ())) < variant.num_seeds
    ]
    lines = [
        "",
        "## Results",
        "",
        f"{content['date']}, trained at commit {', '.join(commits)}, {content['machine']}.",
        *([f"Not trained yet, wholly or in part: {', '.join(missing)}."] if missing else []),
        "",
        "![Validation loss by routing](images/study_loss.png)",
        "",
        *tables.routings(results),
        "",
        fill(
            "Losses in nats per token, over seeds as mean (and standard deviation). Loss, experts "
            "and their deviation over tokens and layers are those of the trained model on all "
            "held-out text, in the same whole sequences for every run. The work in experts is that "
            "of the whole training, forward and backward, by the measured counts. The time of a "
            "step is the processor's, with the share of a run's start and evaluations: the clock's "
            "would say what else the machine did meanwhile (both are in the results; "
            "[benchmarks](benchmarks.md) has steps timed in turn).",
            100,
        ),
        *(
            [
                "",
                fill(
                    f"Seeds alone make a standard deviation of {spread:.4f} in the validation "
                    "loss, pooled over the variants with several.",
                    100,
                ),
            ]
            if spread is not None
            else []
        ),
        "",
        "![Experts per token over training](images/study_experts.png)",
        "",
        fill(
            "A line a seed; the band is the standard deviation over tokens and layers in the first "
            "one, and a bar at a dot. The dots are evaluations on held-out sequences drawn at "
            "random. Dashed: "
            f"{TARGET:g} experts.",
            100,
        ),
        "",
        *tables.holding(results),
        *tables.patterns(results),
    ]
    if content["post_hoc"]:
        lines += ["![Thresholds after the fact](images/study_post_hoc.png)", ""]
    return "\n".join(lines)


def _claims(results: Results | None) -> str:
    lines = [
        "",
        "## The claims",
        "",
        fill(
            "Their figures are scores of tasks, which a model this small cannot do; here it is the "
            "validation loss. A difference counts if it is larger than two standard errors (the "
            "figure behind \u00b1): between routings from the spread over seeds, pooled over "
            "all routings with several; within a routing from the spread of the difference over "
            "its seeds. Other margins stand in the table. The rules stood before all runs were "
            "done; while they trained, those for counts were made stricter, after a look at the "
            "counts of DTop-p's first run. The losses were then first read from Megatron's own "
            "evaluations, which draw sequences at random by the seed: two of the same model were "
            "0.02 to 0.05 apart, more than seeds make. They were measured again, on all held-out "
            "text, and the rules left as they were.",
            100,
        ),
        "",
        fill(
            "Losses are compared as the runs came out, which is not at equal numbers of experts: "
            "beside each loss stand the experts per token and the work in experts that it was paid "
            "with. Where the worse one had less of both, a routing lost to more compute; only "
            "top-2, DTop-p and DTop-p without DRN or by layer aim at the same count.",
            100,
        ),
        "",
        "| paper | claim | they saw | this study saw | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim in CLAIMS:
        verdict = judge(claim, results) if results is not None else None
        saw, word = ("not run yet", "") if verdict is None else (verdict.numbers, verdict.word)
        cells = [claim.paper, claim.text, claim.they_saw, saw, word]
        lines.append(f"| {' | '.join(tables.escaped(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"
