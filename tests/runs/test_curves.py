"""The pictures of a run."""

import pytest

from megatron_dynmoe.runs.drawing.curves import MAX_COLUMNS, draw_layers, save_figure


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
