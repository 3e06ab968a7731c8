"""What is read of event files, also of runs that were cut off or resumed."""

import pytest

from megatron_dynmoe.runs.events import NothingLogged, layers, read_run, read_scalars, target_of
from megatron_dynmoe.runs.metric_names import TARGET
from tests.helpers.fake_runs import dtop_p_scalars, make_run, write_events


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


def test_a_run_that_has_logged_no_step_is_told_from_one_that_is_none(tmp_path):
    make_run(tmp_path, {"routing": "top_k"}, {"learning-rate": [(1, 0.1)]})
    with pytest.raises(NothingLogged, match="not logged a step yet"):
        read_run(tmp_path)


def test_layers_are_found_by_their_number(tmp_path):
    names = [f"dynmoe_layers/experts_per_token_layer_{number}" for number in (10, 2, 1)]
    write_events(tmp_path, {name: [(1, 1.0)] for name in names})
    scalars = read_scalars(tmp_path)
    assert list(layers(scalars, "experts_per_token")) == [1, 2, 10]
    assert layers(scalars, "theta") == {}
