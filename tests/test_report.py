"""Summary and curves from event files."""

import json

import pytest
import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_dynmoe.report import read_scalars, summarize_run, write_report

STEPS = 20


def write_events(run_dir, scalars):
    """``scalars``: name -> list of (iteration, value); one second per iteration."""
    writer = EventFileWriter(str(run_dir / "tensorboard"))
    for tag, points in scalars.items():
        for step, value in points:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(wall_time=1000.0 + step, step=step, summary=summary))
    writer.close()


def make_run(run_dir, routing, scalars, **megatron):
    settings = {"global_batch_size": 4, "seq_length": 8, "num_experts": 16, "moe_router_topk": 2}
    (run_dir / "resolved.yaml").write_text(
        yaml.safe_dump({"dynamic_routing": routing, "megatron": settings | megatron})
    )
    write_events(run_dir, scalars)


def dtop_p_scalars():
    steps = range(1, STEPS + 1)
    return {
        "lm loss": [(step, 9.0 - step / 10) for step in steps],
        "lm loss validation": [(10, 8.5), (20, 7.5), (20, 99.0)],  # the last: the test set's
        # off the target at first, 2 on average over the last fifth
        "dynmoe/experts_per_token": [
            (step, 5.0 if step <= 16 else 2.0 + (-1) ** step / 100) for step in steps
        ],
        "dynmoe/std_experts_per_token": [(step, 0.7) for step in steps],
        "dynmoe/threshold": [(step, 0.3) for step in steps],
        "dynmoe_layers/experts_per_token_layer_1": [(step, 2.0) for step in steps],
    }


def test_summary_and_curves_of_a_dtop_p_run(tmp_path):
    routing = {"routing": "dtop_p", "target_experts_per_token": "2"}
    make_run(tmp_path, routing, dtop_p_scalars())
    summary = write_report(tmp_path, wall_seconds=12.5)
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
    summary = write_report(tmp_path)
    assert summary["mean_experts_per_token"] == 2.0
    assert summary["std_experts_per_token"] == 0.0
    assert summary["target_experts_per_token"] is None
    assert summary["wall_seconds"] == pytest.approx(1.0)
    assert (tmp_path / "curves.png").exists()


def test_a_dense_model_has_no_experts(tmp_path):
    make_run(tmp_path, {"routing": "top_k"}, {"lm loss": [(1, 9.0)]}, num_experts=None)
    assert write_report(tmp_path)["mean_experts_per_token"] is None


def test_the_rate_counts_iterations_not_events(tmp_path):
    every_fifth = [(step, 9.0) for step in (5, 10, 15, 20)]
    make_run(tmp_path, {"routing": "top_k"}, {"lm loss": every_fifth})
    assert write_report(tmp_path)["tokens_per_second"] == pytest.approx(32.0)


def test_one_step_has_no_rate(tmp_path):
    make_run(tmp_path, {"routing": "top_k"}, {"lm loss": [(1, 9.0)]})
    assert write_report(tmp_path)["tokens_per_second"] is None


def test_a_schedule_is_kept_as_text(tmp_path):
    routing = {"routing": "dtop_p", "target_experts_per_token": "0:8,10:2"}
    make_run(tmp_path, routing, dtop_p_scalars())
    assert write_report(tmp_path)["target_experts_per_token"] == "0:8,10:2"


def test_a_resumed_run_that_repeats_steps_counts_the_later_ones(tmp_path):
    write_events(tmp_path, {"lm loss": [(1, 9.0), (2, 8.0), (3, 7.0)]})
    write_events(tmp_path, {"lm loss": [(3, 7.5), (4, 6.0)]})
    series = read_scalars(tmp_path)["lm loss"]
    assert series.iterations == [1, 2, 3, 4]
    assert series.values == pytest.approx([9.0, 8.0, 7.5, 6.0])


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"resolved\.yaml"):
        write_report(tmp_path)
    (tmp_path / "resolved.yaml").write_text("dynamic_routing: {routing: top_k}\n")
    with pytest.raises(ValueError, match="event files"):
        write_report(tmp_path)


def test_wall_seconds_default_to_the_events(tmp_path):
    make_run(tmp_path, {"routing": "dtop_p"}, dtop_p_scalars())
    resolved = yaml.safe_load((tmp_path / "resolved.yaml").read_text())
    summary = summarize_run(resolved, read_scalars(tmp_path))
    assert summary["wall_seconds"] == pytest.approx(STEPS - 1)
