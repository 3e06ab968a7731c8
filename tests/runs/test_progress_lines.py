"""The short console lines of the quickstart."""

import pytest

from megatron_dynmoe.runs.progress_lines import shorten

ITERATION = (
    " [2026-11-22 01:24:57.791281] iteration        6/       8 | consumed samples:           48 |"
    " elapsed time per iteration (ms): 30500.0 | learning rate: 2.694296E-04 | global batch size:"
    "     8 | lm loss: 6.679120E+00 | experts per token: 1.9980 (target 2) | threshold: 0.50951 |"
    " balance loss: 2.1277 | tokens/s: 604 | loss scale: 1.0 | grad norm: 0.637 |"
)


def test_a_step_of_dynamic_routing():
    assert shorten(ITERATION) == (
        "  step 6/8 | loss 6.679 | experts per token 1.9980 (target 2) | threshold 0.50951"
        " | tokens/s 604 | 1:01 left"
    )


def test_what_a_rule_moves_has_the_rules_name():
    share = shorten(ITERATION.replace("threshold: 0.50951", "share: 0.12500"))
    assert share.split(" | ")[3] == "share 0.12500"
    nothing = shorten(ITERATION.replace(" threshold: 0.50951 |", ""))
    assert nothing == (
        "  step 6/8 | loss 6.679 | experts per token 1.9980 (target 2) | tokens/s 604 | 1:01 left"
    )


def test_a_step_of_the_baseline_has_no_routing():
    line = ITERATION.replace("experts per token", "x").replace("threshold", "y")
    assert shorten(line.replace("tokens/s", "z")) == "  step 6/8 | loss 6.679 | 1:01 left"


def test_an_evaluation():
    line = " validation loss at iteration 100 | lm loss value: 5.901234E+00 | lm loss PPL: 3E+02 | "
    assert shorten(line) == "  validation at iteration 100: loss 5.901"
    final = line.replace("100 |", "8 on validation set |")
    assert shorten(final) == "  at the end, validation set: loss 5.901"


@pytest.mark.parametrize(
    "line",
    [
        "> note: this model cannot be exported to Hugging Face later",
        "> finished: iteration 20 of 20",
        "> stopped by SIGINT: iteration 6 of 20",
        "> stopped: iteration 6 of 20",
        "WARNING: --bf16 is given, and this CPU multiplies bf16 100 times slower",
    ],
)
def test_what_a_run_says_of_itself_stays(line):
    assert shorten(line + "\n") == line


def test_all_else_is_left_out():
    assert shorten("> finished creating GPT datasets ...") is None
    assert shorten("  vocab_size ...................................... 1000") is None
    assert shorten("") is None


def test_what_the_run_has_to_say_is_kept():
    for line in ("> note: nothing will be kept", "> warning: other data"):
        assert shorten(line + "\n") == line
    assert shorten("> building training, validation and test datasets ...\n") is None
