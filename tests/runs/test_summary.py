"""The summary of a run, and the curves beside it, from event files."""

import json
import math

import pytest
import yaml

from megatron_dynmoe.cli import report
from megatron_dynmoe.runs.events import NothingLogged, read_scalars
from megatron_dynmoe.runs.summary import summarize_run, write_summary_and_curves
from tests.helpers.fake_runs import dtop_p_scalars, make_run

STEPS = 20


def test_summary_and_curves_of_a_dtop_p_run(tmp_path):
    routing = {"routing": "dtop_p", "target_experts_per_token": "2"}
    make_run(tmp_path, routing, dtop_p_scalars())
    summary = write_summary_and_curves(tmp_path, wall_seconds=12.5)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary == {
        "routing": "dtop_p",
        "target_experts_per_token": 2.0,
        "mean_experts_per_token": pytest.approx(2.0, abs=1e-6),
        "std_experts_per_token": pytest.approx(0.7),
        "final_threshold": pytest.approx(0.3),
        "first_loss": pytest.approx(8.9),
        "last_loss": pytest.approx(7.0),
        "validation_loss": 7.5,
        "iterations": 20,
        "tokens_per_second": pytest.approx(32.0),
        "wall_seconds": 12.5,
    }
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))


def test_the_baseline_reports_its_fixed_k(tmp_path):
    make_run(tmp_path, {"routing": "top_k"}, {"lm loss": [(1, 9.0), (2, 8.0)]})
    summary = write_summary_and_curves(tmp_path)
    assert summary["mean_experts_per_token"] == 2.0
    assert summary["std_experts_per_token"] == 0.0
    assert summary["target_experts_per_token"] is None
    assert summary["wall_seconds"] == pytest.approx(1.0)
    assert (tmp_path / "curves.png").exists()


def test_a_routing_without_a_knob_has_no_threshold(tmp_path):
    scalars = {name: values for name, values in dtop_p_scalars().items() if "threshold" not in name}
    make_run(tmp_path, {"routing": "other"}, scalars)
    summary = write_summary_and_curves(tmp_path)
    assert summary["final_threshold"] is None
    assert summary["mean_experts_per_token"] == pytest.approx(2.0, abs=1e-6)
    assert (tmp_path / "curves.png").exists()


def test_a_dense_model_has_no_experts(tmp_path):
    make_run(tmp_path, {"routing": "top_k"}, {"lm loss": [(1, 9.0)]}, num_experts=None)
    assert write_summary_and_curves(tmp_path)["mean_experts_per_token"] is None


def test_the_rate_counts_iterations_not_events(tmp_path):
    every_fifth = [(step, 9.0) for step in (5, 10, 15, 20)]
    make_run(tmp_path, {"routing": "top_k"}, {"lm loss": every_fifth})
    assert write_summary_and_curves(tmp_path)["tokens_per_second"] == pytest.approx(32.0)


def test_the_rate_follows_a_batch_that_has_grown(tmp_path):
    """Most steps had a batch of 2, the last one, whose size is in the settings, of 4."""
    steps = [(step, 9.0) for step in range(1, 7)]
    batches = [(step, 2 if step < 6 else 4) for step, _ in steps]
    make_run(tmp_path, {"routing": "top_k"}, {"lm loss": steps, "batch-size": batches})
    assert write_summary_and_curves(tmp_path)["tokens_per_second"] == pytest.approx(2 * 8)


def test_one_step_has_no_rate(tmp_path):
    make_run(tmp_path, {"routing": "top_k"}, {"lm loss": [(1, 9.0)]})
    assert write_summary_and_curves(tmp_path)["tokens_per_second"] is None


def test_a_loss_that_is_no_number_leaves_valid_json(tmp_path, capsys):
    """JSON has neither NaN nor infinity; Python writes and reads both, jq and browsers do not."""
    losses = [(1, 9.0), (2, math.inf), (3, math.nan)]
    make_run(tmp_path, {"routing": "top_k"}, {"lm loss": losses})
    report.main([str(tmp_path)])
    printed = capsys.readouterr().out
    for text in ((tmp_path / "summary.json").read_text(), printed[: printed.index("}") + 1]):
        summary = json.loads(text, parse_constant=pytest.fail)
        assert summary["first_loss"] == 9 and summary["last_loss"] is None


def test_a_schedule_is_kept_as_text(tmp_path):
    routing = {"routing": "dtop_p", "target_experts_per_token": "0:8,10:2"}
    make_run(tmp_path, routing, dtop_p_scalars())
    assert write_summary_and_curves(tmp_path)["target_experts_per_token"] == "0:8,10:2"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"resolved\.yaml"):
        write_summary_and_curves(tmp_path)
    (tmp_path / "resolved.yaml").write_text("dynamic_routing: {routing: top_k}\n")
    with pytest.raises(NothingLogged, match="event files"):
        write_summary_and_curves(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        write_summary_and_curves(tmp_path / "elsewhere")


def test_wall_seconds_default_to_the_events(tmp_path):
    make_run(tmp_path, {"routing": "dtop_p"}, dtop_p_scalars())
    resolved = yaml.safe_load((tmp_path / "resolved.yaml").read_text())
    summary = summarize_run(resolved, read_scalars(tmp_path))
    assert summary["wall_seconds"] == pytest.approx(STEPS - 1)
