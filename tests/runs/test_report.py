"""Summary and curves from event files."""

import json

import pytest
import yaml

from megatron_dynmoe.runs.report import (
    MAX_COLUMNS,
    TARGET,
    NothingLogged,
    draw_layers,
    layers,
    read_run,
    read_scalars,
    save_figure,
    summarize_run,
    target_of,
    write_report,
)
from tests.helpers.fake_runs import dtop_p_scalars, make_run, write_events

STEPS = 20


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


def test_the_rate_follows_a_batch_that_has_grown(tmp_path):
    """Most steps had a batch of 2, the last one, whose size is in the settings, of 4."""
    steps = [(step, 9.0) for step in range(1, 7)]
    batches = [(step, 2 if step < 6 else 4) for step, _ in steps]
    make_run(tmp_path, {"routing": "top_k"}, {"lm loss": steps, "batch-size": batches})
    assert write_report(tmp_path)["tokens_per_second"] == pytest.approx(2 * 8)


def test_the_target_is_that_of_each_step_also_after_a_resume_with_another(tmp_path):
    scalars = dtop_p_scalars() | {TARGET: [(step, 4 if step <= 12 else 2) for step in range(1, 21)]}
    make_run(tmp_path, {"routing": "dtop_p", "target_experts_per_token": "2"}, scalars)
    resolved, found = read_run(tmp_path)
    target = target_of(resolved["dynamic_routing"], found)
    assert target.iterations == list(range(1, 21))
    assert target.values == [4] * 12 + [2] * 8


def test_runs_that_logged_no_target_have_that_of_their_settings(tmp_path):
    routing = {"routing": "dtop_p", "target_experts_per_token": "0:8,10:2"}
    make_run(tmp_path, routing, dtop_p_scalars())
    target = target_of(routing, read_scalars(tmp_path))
    assert target.values[:2] == [8.0, 7.4] and set(target.values[10:]) == {2.0}
    assert target_of({"routing": "top_p"}, read_scalars(tmp_path)) is None


def test_one_step_has_no_rate(tmp_path):
    make_run(tmp_path, {"routing": "top_k"}, {"lm loss": [(1, 9.0)]})
    assert write_report(tmp_path)["tokens_per_second"] is None


def test_a_schedule_is_kept_as_text(tmp_path):
    routing = {"routing": "dtop_p", "target_experts_per_token": "0:8,10:2"}
    make_run(tmp_path, routing, dtop_p_scalars())
    assert write_report(tmp_path)["target_experts_per_token"] == "0:8,10:2"


@pytest.mark.parametrize("names", ["12", "21"])
def test_a_resumed_run_makes_void_what_the_start_before_logged(tmp_path, names):
    """Whatever the files are called: those of one second are in no order."""
    before = {
        "lm loss": [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0), (5, 5.0)],
        "lm loss validation": [(2, 8.1), (4, 6.1), (5, 5.1), (5, 99.0)],  # the last: the test set's
        "dynmoe/validation_experts_per_token": [(2, 3.0), (4, 3.0), (5, 3.0), (5, 99.0)],
    }
    after = {
        "lm loss": [(3, 7.5), (4, 6.5)],
        "lm loss validation": [(4, 6.2)],
        "dynmoe/validation_experts_per_token": [(4, 2.0)],
    }
    folder = tmp_path / "tensorboard"
    for name, scalars, start in zip(names, (before, after), (1000, 2000), strict=True):
        file = write_events(tmp_path, scalars, start)
        file.rename(folder / f"events.out.tfevents.{name}")
    read = {
        tag: (series.iterations, series.values) for tag, series in read_scalars(tmp_path).items()
    }
    assert read["lm loss"] == ([1, 2, 3, 4], pytest.approx([9.0, 8.0, 7.5, 6.5]))
    assert read["lm loss validation"] == ([2, 4], pytest.approx([8.1, 6.2]))
    assert read["dynmoe/validation_experts_per_token"] == ([2, 4], [3.0, 2.0])


def test_what_a_killed_start_leaves_is_no_obstacle(tmp_path):
    """An empty file, and one that ends in the middle of an event."""
    cut = write_events(tmp_path, {"lm loss": [(1, 9.0), (2, 8.0), (3, 7.0)]})
    cut.write_bytes(cut.read_bytes()[:-5])
    write_events(tmp_path, {})
    (tmp_path / "tensorboard" / "events.out.tfevents.9999999999.empty").touch()
    write_events(tmp_path, {"lm loss": [(3, 7.5), (4, 6.0)]}, start=2000)
    series = read_scalars(tmp_path)["lm loss"]
    assert series == ([1, 2, 3, 4], pytest.approx([9.0, 8.0, 7.5, 6.0]), [1001, 1002, 2003, 2004])


def test_a_clock_that_is_set_back_takes_nothing_away(tmp_path):
    """Within a start the order of the events is that of the file."""
    folder = tmp_path / "tensorboard"
    write_events(tmp_path, {"lm loss": [(1, 9.0), (2, 8.0), (3, 7.0)]})
    (file,) = folder.iterdir()
    write_events(tmp_path, {"lm loss": [(4, 6.0), (5, 5.0)]}, start=998)
    (later,) = set(folder.iterdir()) - {file}
    records = later.read_bytes()
    file.write_bytes(file.read_bytes() + records[_length_of_first(records) :])
    later.unlink()
    assert read_scalars(tmp_path)["lm loss"].iterations == [1, 2, 3, 4, 5]


def _length_of_first(records: bytes) -> int:
    """Of an event file's first record: its length, two checksums and the data."""
    return 8 + 4 + int.from_bytes(records[:8], "little") + 4


def test_an_evaluation_without_training_changes_no_curve(tmp_path):
    """Of the test set at the end, or of an earlier checkpoint by ``--skip-train``."""
    losses = {
        "lm loss": [(2, 8.0), (4, 6.0)],
        "lm loss validation": [(2, 8.1), (4, 6.1), (4, 99.0)],
    }
    write_events(tmp_path, losses)
    write_events(tmp_path, {"lm loss validation": [(2, 98.0)]}, start=2000)
    series = read_scalars(tmp_path)["lm loss validation"]
    assert (series.iterations, series.values) == ([2, 4], pytest.approx([8.1, 6.1]))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"resolved\.yaml"):
        write_report(tmp_path)
    (tmp_path / "resolved.yaml").write_text("dynamic_routing: {routing: top_k}\n")
    with pytest.raises(NothingLogged, match="event files"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        write_report(tmp_path / "elsewhere")


def test_a_run_that_has_logged_no_step_is_told_from_one_that_is_none(tmp_path):
    make_run(tmp_path, {"routing": "top_k"}, {"learning-rate": [(1, 0.1)]})
    with pytest.raises(NothingLogged, match="not logged a step yet"):
        read_run(tmp_path)


def test_wall_seconds_default_to_the_events(tmp_path):
    make_run(tmp_path, {"routing": "dtop_p"}, dtop_p_scalars())
    resolved = yaml.safe_load((tmp_path / "resolved.yaml").read_text())
    summary = summarize_run(resolved, read_scalars(tmp_path))
    assert summary["wall_seconds"] == pytest.approx(STEPS - 1)


def test_layers_are_found_by_their_number(tmp_path):
    names = [f"dynmoe_layers/experts_per_token_layer_{number}" for number in (10, 2, 1)]
    write_events(tmp_path, {name: [(1, 1.0)] for name in names})
    scalars = read_scalars(tmp_path)
    assert list(layers(scalars, "experts_per_token")) == [1, 2, 10]
    assert layers(scalars, "theta") == {}


def test_the_heat_map_averages_steps_and_leaves_layers_without_experts_empty():
    from matplotlib.figure import Figure

    steps = 2 * MAX_COLUMNS
    axis = Figure().subplots()
    up, down = [float(step) for step in range(steps)], [float(-step) for step in range(steps)]
    draw_layers(axis, range(1, steps + 1), {1: up, 3: down})
    (mesh,) = axis.collections
    values = mesh.get_array().reshape(3, MAX_COLUMNS)
    assert values[0][:2].tolist() == [0.5, 2.5]
    assert values[2][-1] == -(steps - 1.5)
    assert values.mask[1].all() and not values.mask[0].any()
    assert axis.get_xlim() == (0, steps) and axis.get_ylim() == (0.5, 3.5)


def test_a_picture_that_fails_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    from matplotlib.figure import Figure

    path = tmp_path / "curves.png"
    save_figure(Figure(), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_figure(Figure(), path, dpi="many")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
