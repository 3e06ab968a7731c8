"""The work of a training: by its counts, by arithmetic, and of rows that lack it."""

import dataclasses
import json
from pathlib import Path

import pytest

from study import flops, rules, runs, settings
from study.corpus import Corpus
from study.variants import SIZES, Variant
from tests.helpers.fake_runs import dtop_p_scalars, make_run

CPU, TEXT = SIZES["cpu"], Corpus("text", ["book"], None)
STEPS, TOKENS = 20, 4 * 8  # of a fake run
EXPERT = 6 * 3 * 16 * 32  # a token in an expert of a fake run, there and back
LOSS = {"lm loss": [(step, 9.0) for step in range(1, STEPS + 1)]}


def run_in(folder, name="dtop_p"):
    (run,) = runs.plan(CPU, TEXT, "code", folder, only=[name], num_seeds=1, variants=rules.VARIANTS)
    return run


def test_measured_work_is_that_of_every_steps_count(tmp_path):
    run = run_in(tmp_path)
    scalars = dtop_p_scalars()
    make_run(run.folder, {"routing": "dtop_p", "target_experts_per_token": "2"}, scalars)
    counts = sum(value for _, value in scalars["dynmoe/experts_per_token"])
    assert counts > 2 * STEPS  # at its end it uses 2
    assert flops.measured(run) == pytest.approx(counts * TOKENS * 2 * EXPERT)  # 2 layers


def test_shared_experts_and_dense_layers_count_and_a_dense_models_mlps(tmp_path):
    run = run_in(tmp_path)
    make_run(
        run.folder, {"routing": "top_k"}, LOSS,
        moe_layer_freq=[0, 1], moe_shared_expert_intermediate_size=16,
        moe_ffn_hidden_size=8, moe_router_topk=3,
    )  # fmt: skip
    # One layer is dense, of 32; the other has 3 experts of 8 beside one of 16.
    assert flops.measured(run) == pytest.approx(STEPS * TOKENS * EXPERT * (1 + 3 / 4 + 1 / 2))
    dense = dataclasses.replace(run, folder=tmp_path / "dense")
    make_run(dense.folder, {"routing": "top_k"}, LOSS, num_experts=None)
    assert flops.measured(dense) == pytest.approx(STEPS * TOKENS * 2 * EXPERT)


def test_work_is_known_of_models_whose_tokens_use_the_same_number():
    tokens, layers, expert = 504 * 2048, 6, 6 * 3 * 128 * 256
    known = {name: flops.known(run_in(Path(), name)) for name in rules.VARIANTS}
    of_two = pytest.approx(tokens * layers * 2 * expert)
    # With a shared expert there is a dense layer of 2, and one and one in the others.
    assert known["top2"] == known["dense"] == known["top1_shared"] == of_two
    assert known["top1"] == pytest.approx(known["top2"] / 2)
    dynamic = rules.VARIANTS.keys() - {"top2", "dense", "top1_shared", "top1"}
    assert {name for name, found in known.items() if found is None} == dynamic


def test_a_dense_first_layer_is_as_wide_as_its_mlp():
    shared = rules.VARIANTS["top1_shared"]
    variant = Variant("top2_shared", "", shared.flags.replace("-topk 1", "-topk 2"))
    (run,) = runs.plan(CPU, TEXT, "code", Path(), variants={variant.name: variant})
    # Five layers have two experts beside the shared one, the first one an MLP as wide as two.
    assert flops.known(run) == pytest.approx(504 * 2048 * 6 * 3 * 128 * 256 * (5 * 3 + 2))


def test_rows_are_filled_from_their_own_runs_alone(tmp_path):
    planned = [run_in(tmp_path, name) for name in ("dtop_p", "no_drn", "by_layer", "top2", "relu")]
    ours, other, gone, by_arithmetic, has_it = planned
    row = {"commit": "abc", "validation_loss": 4.5, "validation_experts_per_token": 2.0}
    rows = {run.name: dict(row) for run in planned} | {has_it.name: row | {flops.FLOPS: 7.0}}
    measured = {"validation_loss": 4.5, "validation_experts_per_token": 2.0}
    for run, loss in ((ours, 4.5), (other, 4.6), (has_it, 4.5)):
        folder = run.folder.with_name(f"{run.name}-other")  # of other code
        make_run(folder, {"routing": "dtop_p", "target_experts_per_token": "2"}, dtop_p_scalars())
        (folder / runs.HELD_OUT).write_text(json.dumps(measured | {"validation_loss": loss}))
    (tmp_path / f"{ours.name}-aborted").mkdir()
    assert flops.fill(rows, planned, tmp_path) == [ours.name, by_arithmetic.name]
    assert rows[ours.name][flops.FLOPS] > 0 and rows[has_it.name][flops.FLOPS] == 7.0
    for run in (other, gone):
        assert flops.FLOPS not in rows[run.name]
    assert flops.fill(rows, planned, tmp_path) == []


def test_the_command_fills_rows_and_trains_nothing(tmp_path, capsys):
    from study import parts

    row = {"commit": "abc", "validation_loss": 4.5}
    (tmp_path / "rules.json").write_text(json.dumps({"top2-seed1": row, "relu-seed1": row}))
    flags = ["--quick", "--fill", "--runs", str(tmp_path)]
    assert parts.main(rules.PART, flags) == 0
    assert "rules.json: top2-seed1 filled" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rules.json").read_text())
    assert rows["top2-seed1"][flops.FLOPS] > 0 and flops.FLOPS not in rows["relu-seed1"]
    assert parts.main(settings.PART, flags) == 0
    assert "settings.json: no row filled" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"rules.json"}
