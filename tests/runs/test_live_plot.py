"""--live-plot: redrawn while the run goes on, and never in its way."""

import time
from types import SimpleNamespace

import pytest

from megatron_dynmoe.runs.drawing.live_plot import redrawing
from tests.helpers.fake_runs import dtop_p_scalars, make_run

PAUSE = 0.05
# Seconds until something has to happen: the drawing has the lowest priority on a busy machine.
PATIENCE = 240


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("megatron_dynmoe.runs.drawing.live_plot.MAX_SHARE", 1.0)


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_the_curves_appear_while_the_run_goes_on(tmp_path):
    make_run(tmp_path, {"routing": "dtop_p", "target_experts_per_token": "2"}, dtop_p_scalars())
    flushed = []
    writer = SimpleNamespace(flush=lambda: flushed.append(1))
    with redrawing(tmp_path, lambda: writer, PAUSE):
        assert wait_for((tmp_path / "curves.png").exists)
        assert flushed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*partial"))


def test_before_the_first_step_there_is_nothing_to_draw_and_nothing_to_say(tmp_path, capfd):
    make_run(tmp_path, {"routing": "top_k"}, {"learning-rate": [(1, 0.1)]})
    flushed = []
    writer = SimpleNamespace(flush=lambda: flushed.append(1))
    with redrawing(tmp_path, lambda: writer, PAUSE):
        assert wait_for(lambda: len(flushed) > 1)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("where", ["in the drawing", "in the writer"])
def test_a_failure_is_said_once_and_the_block_goes_on(tmp_path, capfd, where):
    tried = []

    def get_writer():
        tried.append(1)
        if where == "in the writer":
            raise OSError("disk full")

    with redrawing(tmp_path, get_writer, PAUSE):
        assert wait_for(lambda: len(tried) > 2)
    said = capfd.readouterr().out
    assert said.count("warning: --live-plot") == 1
    assert ("resolved.yaml" if where == "in the drawing" else "disk full") in said


def test_the_end_of_the_run_waits_for_no_drawing(tmp_path, monkeypatch):
    drawing, started = tmp_path / "draws for ever", tmp_path / "started"
    drawing.write_text(f"#!/bin/sh\n: > '{started}'\nexec sleep 120\n")
    drawing.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(drawing))
    with redrawing(tmp_path, lambda: None, PAUSE):
        assert wait_for(started.exists)
        ended = time.monotonic()
    assert time.monotonic() - ended < 60
