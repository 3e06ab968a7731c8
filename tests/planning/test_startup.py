"""The line that a training prints about its worst case."""

import pytest

from megatron_dynmoe.planning.startup import describe_bound

pytestmark = pytest.mark.megatron
GB = 10**9


def test_what_always_fits(memory_model):
    line = describe_bound(memory_model("dtop_p_16e"), 2, 80 * GB)
    assert line.startswith("> memory: at most ") and line.endswith("whatever the routing")


@pytest.mark.parametrize(
    ("cap", "words"),
    [(None, "no max_experts_per_token is set"), (12, "max_experts_per_token is 12")],
)
def test_what_may_not_fit_comes_with_the_cap_that_does(memory_model, cap, words):
    model = memory_model("dtop_p_16e")
    line = describe_bound(model, cap, 40 * GB)
    assert line.startswith("WARNING") and words in line and "of 40.00 GB" in line
    largest = model.cap_that_fits(40 * GB)
    assert f"{largest} is the largest" in line
    assert model.worst_case(largest)[1].total <= 40 * GB < model.worst_case(largest + 1)[1].total


def test_where_no_cap_helps_something_else_is_named(memory_model):
    assert "try a lower --micro-batch-size" in describe_bound(memory_model("dtop_p_16e"), 1, 8 * GB)
