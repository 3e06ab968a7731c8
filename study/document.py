"""Writes docs/study.md and its pictures from the results, so that no figure is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from study import budgets, influences, rules, sections, tables
from study.claims import CLAIMS, judge
from study.fingerprint import ROOT
from study.parts import read_rows
from study.results import Results
from study.tables import paragraph
from study.variants import SIZES, TARGET, VARIANTS, Size, Variant

DOCUMENT, IMAGES = ROOT / "docs" / "study.md", ROOT / "docs" / "images"
SIZE = "cpu"  # the size that the document is about

_INTRODUCTION = """\
# The papers' claims on a small model

Written by `python -m study document` from the rows in `study/results/`. A test compares.

`make study` trains the routings of both papers on the same text with the same model, steps and
seeds, and tests what each paper claims. It is small: 6 layers of hidden size 128 with 16 experts
of 256, {steps} steps of {tokens_per_step:,} tokens, a text of a few megabytes. A claim that holds
here may not hold at the papers' sizes, and the other way round.

    make study                             # at most 4 hours on 2 cores; again: resumes
    nohup make study > study.log &         # in the background; after kill %1 it saves and ends
    make study STUDY="--list"              # what is trained, and how far it is
    make study STUDY="--quick"             # a few minutes, to see whether everything works
    make study STUDY="--only dtop_p top2 --tokens-scale 0.5"
    make study-gpu STUDY="--text mine.jsonl.gz"    # larger, on one GPU, on text of your own
    make study PART=tokens STUDY="--seeds 1"       # one of the "Parts"

Trainings run {jobs} at a time, with one thread each. At Ctrl-C or SIGTERM they save and end; the
same command continues from there, or after a crash from the last checkpoint. A run is not trained
again if its flags, its text and the code that trains are the same (comments and docstrings do not
count); `--any-code` also takes finished runs of other code. The runs are in `runs/study`;
`dynmoe plot runs/study/dtop_p-seed1-* runs/study/top2-seed1-*` draws two of them into
one picture.

The size for a GPU ({gpu}) has not been run yet.

**Parts.** Other comparisons are parts, with rows of their own in `study/results/`, from which their
tables are drawn. A part can be trained run by run, on any day: a finished run adds its row and
counts as done, and `make study PART=tokens STUDY="--list"` shows which wait. `granularity` to
`settings` take 60 to 75 minutes each on two cores, by the processor time of a few of their steps;
if models have fewer than three seeds, three would take more than 90. Each axis also has the study's
own model, which `PART=rules` trains. `influences` takes a few minutes after `rules`, whose models
it looks at. `rules` has {num_runs} runs; those that were timed took 6 to 8 processor minutes each.
So these lines take about an hour on two cores each, one seed of all rules after the other:

    make study PART=rules STUDY="--seeds 1"    # the first seed of all rules
    make study PART=rules STUDY="--seeds 2"    # then the second
    make study PART=rules                      # then the third
    make study PART=rules STUDY="--only dtop_p relu --seeds 2"    # two rules: about 20 minutes

{parts}

### Rules at equal counts

{status}

Every [rule](rules.md) has the text and size below. The loss is that of all held-out text, in nats.
A rule is compared with DTop-p seed by seed, because a seed (the order of the text, the first
weights) moves all rules alike: the difference is the mean over the seeds that both have. Its 95 %
interval is Student's, by what neither rule nor seed explains in the runs of this table and of the
[main study](#what-is-compared). (The pairing was chosen when two seeds had been trained; before,
the table compared means.) *DRN without controller* and *fixed top-p* (which has neither) have
thresholds that were chosen for about 2 experts; see their counts.

Equal counts on held-out text are not equal work in training. *TFLOP in experts* is that of the
whole training, forward and backward, by the count of every step; shared experts and the MLPs of
dense layers count, too. A fixed threshold begins with more experts than it ends with, ReLU with
[half of its gates open, and soon more](rules.md#relu), and top-1 has half of the work throughout.
The figure is the mean over the seeds of which it is known: the first runs did not keep it.

*Shared expert* is the model of expert threshold's paper at the FLOPs of two experts: a token has
one shared expert and on average one other, which the table counts, and the first layer is dense.
Top-1 is what that paper compares with, here by a softmax. Without a shared expert, half of the
tokens have no expert in most layers of [expert threshold](rules.md#without-a-shared-expert). With
[null experts](rules.md#in-a-small-model) that put out zero, nothing teaches a token how many
experts it needs.

{rules}

A verdict is *barely* so if its interval ends within a tenth of its half from 0. It would not stand
with a little more noise, and decides no [claim](#the-claims). The same training by another version
of the code, or on another processor, is another draw, so the same model has other losses in the
main study, and each table takes all seeds of a model from one file.

{picture}
Other pairs, in the same way. Each interval is one of 95 % by itself, here and above: of twenty
pairs that do not differ at all, one would be marked on average.

{pairs}

What each of them was trained with, beside what [all have](#what-is-compared); what is not given is
the rule's [default](rules.md):

{flags}
{sections}

## What is compared

{variants}

The text is the files of `examples/data`. The last 5 % of each file's documents are held out for
evaluation. All of these variants have a balance loss per sequence with a coefficient of 1e-2
(top-2: 2e-2, since Megatron divides by k), also DTop-p, whose authors take 1e-4 for a larger model;
[rules](rules.md) that are not named here have the losses of their defaults. The seed sets the
initialization and the order of the text. The dense model's MLP is as wide as two experts.
"""

_OF_RULES = """\
![By how much the loss of each rule is more than DTop-p's](images/study_rules.png)
"""
_NOT_RUN = """
## Results

**The full study has not been run yet**, so there are no figures here. `make study` runs it and
writes them into this page.
"""


def write(results: Results | None) -> list[Path]:
    """Write the page and, if there are results, the pictures; returns the files."""
    from study.figures import draw_all, draw_budgets, draw_leads, draw_rules

    written = [DOCUMENT]
    if rules.differences(of_rules := rules.PART.all_rows(), results):
        written.append(draw_rules(of_rules, results, IMAGES))
    if of_axes := sections.known_leads(results):
        written.append(draw_leads(of_axes, IMAGES))
    if of_budgets := read_rows(budgets.PART.results):
        written.append(draw_budgets(of_budgets, IMAGES))
    if results is not None:
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
        variants=_variants(VARIANTS),
        num_runs=rules.PART.num_runs,
        parts=sections.all_parts(),
        status=paragraph(sections.status(rules.PART, of_rules := rules.PART.all_rows())),
        rules="\n".join(rules.table(of_rules, results)),
        picture=_OF_RULES if rules.differences(of_rules, results) else "",
        pairs="\n".join(rules.pairs(of_rules, results)),
        flags=_variants(rules.VARIANTS),
        sections="\n".join(sections.of_parts(results)),
    )
    if results is None:
        return page + _NOT_RUN + _claims(None)
    return page + _results(results) + _claims(results)


def _describe(size: Size) -> str:
    tokens = size.steps * size.tokens_per_step
    return f"{size.steps} steps of {size.tokens_per_step:,} tokens, {tokens / 1e6:.0f} M in all"


def _variants(variants: Mapping[str, Variant]) -> str:
    rows = ["| name | routing | seeds | flags |", "| --- | --- | --- | --- |"]
    for variant in variants.values():
        flags = variant.flags.format(**SIZES[SIZE].sizes)
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
        paragraph(
            "Losses are in nats per token: the mean over seeds (and the standard deviation). Loss, "
            "experts and their deviation over tokens and layers are those of the trained model on "
            "all held-out text, in the same whole sequences for every run. The work in experts is "
            "that of the whole training, forward and backward, by the measured counts. The time of "
            "a step is processor time, and includes its share of a run's start and evaluations. "
            "The time on the clock would also depend on what else the machine did (the results "
            "have both; [benchmarks](benchmarks.md) has steps that were timed in turn).",
        ),
        *(
            [
                "",
                paragraph(
                    f"Seeds alone cause a standard deviation of {spread:.4f} in the validation "
                    "loss, pooled over the variants with several seeds.",
                ),
            ]
            if spread is not None
            else []
        ),
        "",
        "![Experts per token over training](images/study_experts.png)",
        "",
        paragraph(
            "There is one line per seed. For the first seed the band, and the bar at a dot, show "
            "the standard deviation over tokens and layers. The dots are evaluations on held-out "
            "sequences that were drawn at random. The dashed line is at "
            f"{TARGET:g} experts.",
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
        paragraph(
            "The papers' figures are scores of tasks, which a model this small cannot do; this "
            "study compares the validation loss. A difference counts if it is larger than two "
            "standard errors (the figure behind \u00b1). Between routings the error comes from the "
            "spread over seeds, pooled over all routings with several; within a routing it comes "
            "from the spread of the difference over its seeds. The table gives other margins. We "
            "set the rules before the runs were done; while they trained, we looked at the counts "
            "of DTop-p's first run and made the rules for counts stricter. We first read the "
            "losses from Megatron's own evaluations, which draw sequences at random by the seed: "
            "two evaluations of the same model were 0.02 to 0.05 apart, more than the seeds "
            "cause. So we measured the losses again, on all held-out text, and left the rules as "
            "they were.",
        ),
        "",
        paragraph(
            "The losses that are compared were not reached with equal numbers of experts. So "
            "each loss comes with the experts per token and the work in experts that it took. "
            "If the worse routing had less of both, it lost to more compute; only "
            "top-2, DTop-p and DTop-p without DRN or by layer aim at the same count. Claims *at "
            "equal counts* are judged by the [rules at equal counts](#rules-at-equal-counts), and "
            "count more than those that point to them.",
        ),
        "",
        "| paper | claim | they saw | this study saw | |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows, of_influences = [], influences.PART.all_rows()
    for claim in CLAIMS:
        verdict = judge(claim, results) if results is not None else None
        saw, word = ("not run yet", "") if verdict is None else (verdict.numbers, verdict.word)
        if claim.plain and verdict is not None and of_influences:
            saw += f". {influences.in_words(of_influences)}"
            word += ", by the plain correlation alone"
        text = claim.text + " (See: at equal counts.)" * claim.at_equal_counts
        cells = [claim.paper, text, claim.they_saw, saw, word]
        rows.append(cells)
    for cells in [*rows, *sections.claims(results)]:
        lines.append(f"| {' | '.join(tables.escaped(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"
