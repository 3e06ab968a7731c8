"""What is said of a token's experts, difficulty and entropy: plain and partial."""

import json
from argparse import Namespace

from megatron_dynmoe.analysis.counting.influences import INFLUENCES
from study import document, influences
from study.results import Results
from tests.study.test_study import synthetic


def rows(**strongest):
    """Two seeds of two layers: the second layer of seed 2 has the strongest partial correlation."""

    def numbers(value):
        return {"plain": 0.5, "partial": value, "low": value - 0.02, "high": value + 0.02}

    def layers(second):
        return [
            {"layer": 1} | {name: numbers(0.01) for name in INFLUENCES},
            {"layer": 2} | {name: numbers(second.get(name, 0.03)) for name in INFLUENCES},
        ]

    return {
        "dtop_p-seed1": {"tokens": 10, "layers": layers({})},
        "dtop_p-seed2": {"tokens": 10, "layers": layers(strongest)},
    }


def test_every_influence_has_a_line_with_its_strongest_partial_correlation():
    assert influences.TITLES.keys() == set(INFLUENCES)
    lines = influences.table(rows(own_loss=0.07, entropy=-0.25))
    assert lines[2] == (
        "| the token's own loss (difficulty) | +0.50 +0.50 | +0.01 +0.05 "
        "| +0.07 (+0.05 to +0.09), layer 2, seed 2 |"
    )
    (of_entropy,) = (line for line in lines if line.startswith("| the entropy"))
    assert "| +0.01 -0.11 | -0.25 (-0.27 to -0.23), layer 2, seed 2 |" in of_entropy
    assert "means over 2 seeds" in lines[-1]
    left = "own loss is +0.07 where it is strongest, that with the entropy -0.25, and that with how"
    assert left in lines[-1].replace("\n", " ")


def test_the_claim_of_harder_input_says_what_is_left_of_it(monkeypatch, tmp_path):
    def claim():
        page = document._claims(Results(synthetic()))
        (line,) = (line for line in page.splitlines() if "| Harder input" in line)
        return line

    kept = tmp_path / "influences.json"
    monkeypatch.setattr(influences, "PART", Namespace(name="influences", all_rows=lambda: {}))
    assert "plain correlation" not in claim()
    kept.write_text(json.dumps(rows(own_loss=0.07)))
    monkeypatch.setattr(influences.PART, "all_rows", lambda: json.loads(kept.read_text()))
    assert "all else equal, the correlation with a token's own loss is +0.07" in claim()
    assert claim().endswith("([table](#influences)) | holds here, by the plain correlation alone |")
