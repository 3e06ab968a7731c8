"""dynmoe plot: what is drawn, from events with known numbers, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from megatron_dynmoe.cli import plot
from megatron_dynmoe.runs.drawing import overlay
from megatron_dynmoe.runs.metric_names import TARGET
from tests.helpers.commands import exit_code_of
from tests.helpers.fake_runs import dtop_p_scalars, make_run

TOKENS = 4 * 8  # a step of a fake run
EXPERT = 6 * 3 * 16 * 32  # floating-point operations of a token in an expert, there and back
LOSS = {"lm loss": [(step, 9.0 - step / 10) for step in range(1, 21)]}


@pytest.fixture
def runs(tmp_path):
    """The folders of a DTop-p run, a top-2 run and a dense one."""
    make_run(
        tmp_path / "dtop_p",
        {"routing": "dtop_p", "target_experts_per_token": "2"},
        dtop_p_scalars(),
    )
    make_run(tmp_path / "top2", {"routing": "top_k"}, LOSS)
    make_run(tmp_path / "dense", {"routing": "top_k"}, LOSS, num_experts=None)
    return [tmp_path / name for name in ("dtop_p", "top2", "dense")]


def test_compute_is_that_of_the_measured_experts(runs):
    dtop_p, top2, dense = (overlay.read(run, run.name) for run in runs)
    steps = np.arange(1, 21)
    for run in (dtop_p, top2, dense):
        assert run.tokens.tolist() == (steps * TOKENS).tolist()
    of_a_step = np.diff(dtop_p.expert_flops, prepend=0)
    assert of_a_step[0] == pytest.approx(5.0 * 2 * TOKENS * EXPERT)  # 2 layers
    assert of_a_step[18] == pytest.approx(2.05 * 2 * TOKENS * EXPERT)
    assert top2.expert_flops[-1] == pytest.approx(2 * 2 * 20 * TOKENS * EXPERT)
    assert dense.expert_flops[-1] == pytest.approx(1 * 2 * 20 * TOKENS * EXPERT)
    assert dtop_p.target.tolist() == [2.0] * 20
    assert set(top2.experts) == {2.0} and top2.threshold is None and dense.experts is None
    tokens, flops, loss = dtop_p.validation
    assert tokens.tolist() == [10 * TOKENS, 20 * TOKENS] and loss.tolist() == [8.5, 7.5]
    assert flops.tolist() == pytest.approx(dtop_p.expert_flops[[9, 19]])


def test_the_target_is_that_of_each_step_and_none_where_it_is_unknown(tmp_path):
    """The first steps were logged by a version that logged no target."""
    scalars = dtop_p_scalars() | {TARGET: [(step, 4 if step <= 12 else 2) for step in range(6, 21)]}
    make_run(tmp_path, {"routing": "dtop_p", "target_experts_per_token": "2"}, scalars)
    target = overlay.read(tmp_path, "").target
    assert np.isnan(target[:5]).all()
    assert target[5:].tolist() == [4] * 7 + [2] * 8


@pytest.mark.parametrize("frequency, layers", [(1, 2), (2, 1), ([0, 1], 1), ([1, 1], 2)])
def test_layers_without_experts_spend_nothing_in_them(tmp_path, frequency, layers):
    make_run(tmp_path, {"routing": "top_k"}, LOSS, moe_layer_freq=frequency)
    flops = overlay.read(tmp_path, "").expert_flops
    assert flops[0] == pytest.approx(2 * layers * TOKENS * EXPERT)


def test_experts_of_their_own_size_and_without_a_gate(tmp_path):
    make_run(tmp_path, {"routing": "top_k"}, LOSS, moe_ffn_hidden_size=8, swiglu=False)
    flops = overlay.read(tmp_path, "").expert_flops
    assert flops[0] == pytest.approx(2 * 2 * TOKENS * 6 * 2 * 16 * 8)


def test_tokens_follow_a_growing_batch_and_steps_that_were_not_logged(tmp_path):
    logged = {"lm loss": [(2, 9.0), (4, 8.0)], "batch-size": [(2, 4), (4, 8)]}
    make_run(tmp_path, {"routing": "top_k"}, logged)
    assert overlay.read(tmp_path, "").tokens.tolist() == [2 * 4 * 8, 2 * 4 * 8 + 2 * 8 * 8]


def test_smoothing_moves_nothing_and_keeps_the_ends():
    line = np.arange(10.0)
    assert overlay._smooth(line, 4) == pytest.approx(line)
    step = np.array([0.0] * 5 + [1.0] * 5)
    assert overlay._smooth(step, 2) == pytest.approx([0] * 4 + [1 / 3, 2 / 3] + [1] * 4)
    assert overlay._smooth(step, 1).tolist() == step.tolist()


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_tool_draws_all_kinds_of_runs(runs, tmp_path, capsys, suffix, start):
    picture = tmp_path / f"all{suffix}"
    plot.main([*map(str, runs), "--output", str(picture)])
    assert picture.read_bytes().startswith(start)
    said = capsys.readouterr().out
    assert "dtop_p: 640 tokens, loss 7.000, 2.01 experts per token" in said
    assert "dense: 640 tokens, loss 7.000, dense" in said
    assert not list(tmp_path.glob(".*.partial"))


def test_dense_runs_alone_have_no_routing_to_draw(runs, tmp_path):
    overlay.draw(tmp_path / "dense.svg", [overlay.read(runs[2], "dense")])
    text = (tmp_path / "dense.svg").read_text()
    assert "<!-- loss against tokens -->" in text
    assert "<!-- threshold" not in text


def test_names_are_as_long_as_it_takes_to_tell_runs_apart():
    paths = [Path(text) for text in ("a/one/run", "a/two/run", "b/two/run")]
    assert overlay.labels_of(paths) == ["a/one/run", "a/two/run", "b/two/run"]
    assert overlay.labels_of(paths[:2]) == ["one/run", "two/run"]
    assert overlay.labels_of(paths[:1]) == ["run"]


def test_mistakes_get_plain_answers(runs, tmp_path, capsys):
    run = runs[0]
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "silent", {"routing": "top_k"}, {"learning-rate": [(1, 0.1)]})
    make_run(tmp_path / "lost", {"routing": "top_p"}, LOSS)
    for arguments, code, message in [
        ([tmp_path / "nowhere"], 2, "there is no such folder"),
        ([tmp_path / "empty"], 2, "holds no resolved.yaml"),
        ([tmp_path / "silent"], 1, "has not logged a step yet"),
        ([tmp_path / "lost"], 1, "hold no experts per token"),
        ([run, run], 2, "is given twice"),
        ([run, "--labels", "a", "b"], 2, "give one a run"),
        ([run, "--output", "x.jpeg"], 2, "end its name in one of .png, .svg, .pdf"),
        ([run, "--output", tmp_path / "no" / "x.png"], 2, "there is no folder"),
    ]:
        assert exit_code_of(plot.main, [*map(str, arguments)]) == code, arguments
        assert message in capsys.readouterr().err
