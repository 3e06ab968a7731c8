"""Difficulty, entropy or something else: what does a token's number of experts go along with?

    python -m study.influences [--seeds N] [--list] [--quick]

Dynamic MoE says that harder tokens take more experts. But hard tokens are also rare, and stand
before uncertain predictions. So this part looks at the DTop-p models of `PART=rules`, layer by
layer and on all held-out text: the plain rank correlation of a token's experts with six things,
and the partial one, in which what the other five explain has been taken away.
"""

from __future__ import annotations

import statistics
from typing import Any

from study import corpus, runs
from study.parts import Part, Rows, end
from study.results import Results
from study.tables import paragraph
from study.variants import VARIANTS as MAIN

DTOP_P, OWN_LOSS = "dtop_p", "own_loss"
TITLES = {
    OWN_LOSS: "the token's own loss (difficulty)",
    "next_loss": "the next token's loss",
    "entropy": "the entropy of the prediction after it",
    "frequency": "how often it came before",
    "position": "its position in the window",
    "word_start": "whether a word starts with it",
}


def table(rows: Rows, of_main: Results | None = None) -> list[str]:
    """Plain and partial correlations by layer, and the strongest partial one, in Markdown."""
    del of_main  # its models have been measured otherwise
    lines = [
        "| experts and | plain, by layer from the bottom | partial, by layer | strongest partial, "
        "95 % |",
        "| --- " * 4 + "|",
    ]
    for name, title in TITLES.items():
        by_layer = zip(*(row["layers"] for row in rows.values()), strict=True)
        cells = [[layer[name] for layer in of_seeds] for of_seeds in by_layer]
        seed, number, found = _strongest(rows, name)
        interval = f"{found['partial']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"
        row = [
            title,
            *(
                " ".join(f"{statistics.fmean(one[key] for one in cell):+.2f}" for cell in cells)
                for key in ("plain", "partial")
            ),
            f"{interval}, layer {number}, {seed}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    return [
        *lines,
        "",
        paragraph(
            f"Figures by layer are means over {len(rows)} seeds; intervals are over documents, and "
            "[made so](analysis.md#what-the-figures-mean). All else equal, "
            f"{_left(rows)}. A figure of a model like these by layer, with intervals, [is "
            "here](analysis.md#what-the-figures-mean)."
        ),
    ]


def in_words(rows: Rows) -> str:
    """What is left of the correlation with a token's own loss, and what is not."""
    return (
        "This is the plain correlation, of the top-p model. In models of DTop-p, all else equal, "
        f"{_left(rows)} ([table](#{PART.name}))"
    )


def _left(rows: Rows) -> str:
    own, entropy, frequency = (
        f"{_strongest(rows, name)[-1]['partial']:+.2f}"
        for name in (OWN_LOSS, "entropy", "frequency")
    )
    return (
        f"the correlation with a token's own loss is {own} where it is strongest, that with the "
        f"entropy {entropy}, and that with how often the token came before {frequency}"
    )


def _strongest(rows: Rows, name: str) -> tuple[str, int, dict[str, float]]:
    """The seed, the layer and the numbers of the partial correlation that is farthest from 0."""
    found = [
        (run.rpartition("-")[-1].replace("seed", "seed "), layer["layer"], layer[name])
        for run, row in sorted(rows.items())
        for layer in row["layers"]
    ]
    return max(found, key=lambda one: abs(one[-1]["partial"]))


def _measure(run: runs.Run, text: corpus.Corpus) -> dict[str, Any]:
    from study import afterwards  # imports PyTorch

    found = afterwards.routing(run, text)
    return {"tokens": found["all"]["tokens"], "layers": found["influences"]}


PART = Part("influences", __doc__, {DTOP_P: MAIN[DTOP_P]}, _measure, table)

if __name__ == "__main__":
    end(PART)
