"""The table of the routings: whole, and all that follows from a row."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megatron_dynmoe.settings.config import SETTINGS, DynMoEConfig
from megatron_dynmoe.settings.routings import CAPS, CONTROLLER, ROUTINGS, STOCK, TARGET

ROWS = list(ROUTINGS.values())


@pytest.mark.parametrize("kind", ROWS, ids=ROUTINGS)
def test_a_row_is_about_settings_that_it_takes(kind):
    taken = set(kind.takes)
    assert len(taken) == len(kind.takes)
    assert taken <= SETTINGS.keys() - {"routing"}
    assert kind.defaults.keys() | kind.required.keys() | set(kind.instead.values()) <= taken
    assert not kind.defaults.keys() & kind.required.keys() and not kind.instead.keys() & taken
    assert kind.is_controlled or not taken & set(CONTROLLER) - set(TARGET)


def test_every_setting_belongs_to_a_routing():
    assert {name for kind in ROWS for name in kind.takes} == SETTINGS.keys() - {"routing"}


@pytest.fixture
def no_caps(monkeypatch):
    """A routing without caps, in another range."""
    top_p = ROUTINGS["top_p"]
    takes = tuple(name for name in top_p.takes if name not in (*CAPS, "inference_threshold"))
    row = dataclasses.replace(top_p, takes=takes, knob_range=(-4.0, 4.0), knob_remedy="use -4 to 4")
    monkeypatch.setitem(ROUTINGS, "top_p", row)


@pytest.mark.parametrize("name", [*CAPS, "inference_threshold"])
def test_what_a_rule_does_not_read_is_refused(no_caps, name):
    with pytest.raises(ValueError, match=f"{name} is .*'top_p' does not have: .* to 'dtop_p'"):
        DynMoEConfig(routing="top_p", **{name: 1}).resolve(8)
    assert DynMoEConfig(routing="top_p").resolve(8).inference_max_experts_per_token is None


def test_rows_for_the_worst_case_need_a_rule_that_keeps_to_a_cap(no_caps):
    refusal = "row_buffer is 'worst_case', but routing 'top_p' cannot .*: leave row_buffer out"
    with pytest.raises(ValueError, match=refusal):
        DynMoEConfig(routing="top_p", row_buffer="worst_case").resolve(8)


def test_a_knob_has_the_range_of_its_routing(no_caps):
    assert DynMoEConfig(routing="top_p", threshold=-3).resolve(8).threshold == -3
    with pytest.raises(ValueError, match=r"threshold is 5\.0: use -4 to 4"):
        DynMoEConfig(routing="top_p", threshold=5).resolve(8)


def test_help_says_which_routings_have_a_setting_and_what_its_default_is():
    assert "top_p (Dynamic MoE" in SETTINGS["routing"].help
    assert re.search(r"Only with top_p.* Default: 0\.4", SETTINGS["threshold"].help)
    assert re.search(r"Only with dtop_p[^.]*\.$", SETTINGS["target_experts_per_token"].help)
    each = r"Default: raw for top_p.*, renormalized for dtop_p.*\.$"
    assert re.search(each, SETTINGS["weights"].help)
    assert "Only with" not in SETTINGS["backend"].help
    assert ROUTINGS[STOCK].takes == ("backend",)
