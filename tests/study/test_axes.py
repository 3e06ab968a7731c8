"""The papers' axes and settings: what is trained, what a trend is, what the page says of it."""

import itertools
import json
import math
import os
import subprocess
import sys
from argparse import ArgumentParser

import numpy as np
import pytest

from study import document, fingerprint, granularity, rules, runs, sections, settings, size, tokens
from study.axes import Point, table, trend
from study.claims import FAILS, HOLDS, UNCLEAR
from study.corpus import Corpus
from study.parts import joined
from study.results import Comparison, Results
from study.variants import SIZES
from tests.study.test_study import synthetic

CPU, TEXT = SIZES["cpu"], Corpus("text", ["book"], None)
PATIENCE = 600  # seconds for a command, on a busy machine


def planned(part):
    """The flags of a part's runs as they count, by the name of the variant."""
    parser = ArgumentParser(allow_abbrev=False)
    for flag in ("num-layers", "hidden-size", "num-experts", "ffn-hidden-size", "moe-router-topk"):
        parser.add_argument(f"--{flag}", type=int)
    for flag in ("train-iters", "lr-warmup-iters", "eval-interval"):
        parser.add_argument(f"--{flag}", type=int)
    parser.add_argument("--moe-dynamic-target-experts-per-token", type=float)
    for flag in ("moe-aux-loss-coeff", "moe-dynamic-balance-loss-coeff"):
        parser.add_argument(f"--{flag}", type=float)
    found = runs.plan(CPU, TEXT, "code", fingerprint.ROOT, variants=part.variants, num_seeds=1)
    return {run.variant.name: parser.parse_known_args(run.key["flags"])[0] for run in found}


@pytest.mark.parametrize("part", sections.SCALING, ids=lambda part: part.name)
def test_both_routings_of_a_point_have_the_same_model_and_the_same_mean(part):
    flags = planned(part)
    own_model = next(point for point in part.points if not point.name)
    assert own_model.runs == ("dtop_p", "top2") and part.beside == "rules"
    assert set(own_model.runs) <= rules.VARIANTS.keys()
    for point in part.points:
        if point is own_model:
            continue
        ours, theirs = (flags[name] for name in point.runs)
        routing = (
            "moe_router_topk",
            "moe_aux_loss_coeff",
            "moe_dynamic_balance_loss_coeff",
            "moe_dynamic_target_experts_per_token",
        )
        shared = [{k: v for k, v in vars(a).items() if k not in routing} for a in (ours, theirs)]
        assert shared[0] == shared[1]
        assert ours.moe_dynamic_target_experts_per_token == theirs.moe_router_topk == point.experts
        # Megatron divides by k.
        coefficient = theirs.moe_aux_loss_coeff / theirs.moe_router_topk
        assert coefficient == pytest.approx(ours.moe_dynamic_balance_loss_coeff)


def test_only_what_an_axis_names_changes_along_it():
    for name, flags in planned(granularity.PART).items():
        k = int(name.split("e")[-1].removesuffix("a"))
        assert flags.num_experts * flags.ffn_hidden_size == 16 * CPU.ffn
        assert k * flags.ffn_hidden_size == 2 * CPU.ffn and flags.hidden_size == 128
    steps = planned(tokens.PART)
    for name, times in (("dtop_p_x2", 2), ("top2_x4", 4)):
        assert steps[name].train_iters == times * CPU.steps
        assert steps[name].eval_interval == steps[name].train_iters // CPU.num_evaluations
        assert steps[name].lr_warmup_iters == steps[name].train_iters // 10
    small, own, large = size.PART.points
    assert small.at < own.at < large.at and own.title.startswith("1.6 M active: 6 layers of 128")
    assert own.at == 6 * (4 * 128**2 + 2 * 3 * 128 * CPU.ffn)


def test_a_run_has_the_steps_of_its_variant(tmp_path):
    (run,) = runs.plan(CPU, TEXT, "code", tmp_path, only=["top2_x4"], variants=tokens.PART.variants)
    assert run.size.steps == 4 * CPU.steps and run.size.sequence_length == CPU.sequence_length


def test_a_trend_is_the_line_through_the_points_by_their_errors():
    places, leads, errors = [2, 4, 8, 32], [0.04, 0.05, 0.03, 0.09], [0.02, 0.03, 0.01, 0.04]
    known = [Comparison(lead, 0.0, error) for lead, error in zip(leads, errors, strict=True)]
    found = trend(list(zip(places, known, strict=True)))
    sigmas = np.array(errors) / 2
    (slope, _), covariance = np.polyfit(np.log2(places), leads, 1, w=1 / sigmas, cov="unscaled")
    assert found.difference == pytest.approx(slope)
    assert found.error == pytest.approx(2 * covariance[0, 0] ** 0.5)
    unknown = [lead._replace(error=np.inf) for lead in known]
    found = trend(list(zip(places, unknown, strict=True)))
    assert found.difference == pytest.approx(np.polyfit(np.log2(places), leads, 1)[0])
    assert found.interval == f"{found.difference:+.4f}"  # nothing is known of the error


def rows_of(points, leads, seeds=(0.0, 0.02)):
    """Rows in which DTop-p leads by so much at each point."""
    return {
        f"{name}-seed{number}": {
            "validation_loss": 4.0 + lead * (name == top_k) + seed,
            "validation_experts_per_token": 2.0,
        }
        for point, lead in zip(points, leads, strict=True)
        for dtop_p, top_k in [point.runs]
        for name, (number, seed) in itertools.product((dtop_p, top_k), enumerate(seeds, 1))
    }


def test_the_lead_at_each_point_and_its_trend():
    points = [Point(f"{at} wide", at=at, name=f"x{at}") for at in (1, 2, 4)]
    points[0] = Point("narrow", at=1, name="x1", in_trend=False)
    rows = rows_of(points, (9.0, -0.3, 0.5))
    rows["top2_x1-seed2"]["validation_loss"] += 0.06
    # Against a seed that moves all six models alike, one is 0.06 off: its residuals are 5 / 12 of
    # that, those of the others 1 / 12, twice each. By 5 degrees of freedom that is this noise, and
    # 2.5706 is of Student's table.
    half = 2.5706 * 0.06 * math.sqrt(2 * (5 / 12) ** 2 / 5 + 2 * 5 * (1 / 12) ** 2 / 5)
    lines = table(points, rows)
    low, high = 0.5 - half, 0.5 + half
    assert lines[4] == (
        "| 4 wide | 2 | 4.0100 | 2.00 | 2 | 4.5100 | 2.00 "
        f"| +0.5000 ({low:+.4f} to {high:+.4f}) | ahead |"
    )
    assert lines[3].endswith("| behind |")
    # The narrow point, with its large lead, does not count; between two points a doubling lies.
    assert lines[-1].replace("\n", " ") == (
        "By 2 points (2 seeds each) and noise that is mostly that of other models, the lead "
        f"changes by +0.8000 ({0.8 - half * 2**0.5:+.4f} to {0.8 + half * 2**0.5:+.4f}) with each "
        "doubling along the axis: it widens here."
    )
    del rows["top2_x2-seed1"]
    assert "By 2 points (1 and 2 seeds)" in table(points, rows)[-1]
    del rows["dtop_p_x4-seed1"], rows["dtop_p_x4-seed2"]
    lines = table(points, rows)
    assert lines[-1] == "| 4 wide | 0 | - | - | 2 | 4.5100 | 2.00 | - |  |"
    assert len(table(points, rows_of(points[1:2], [0.1]))) == 3  # nothing of the other points


def write(folder, part, rows):
    (folder / part.results.name).write_text(json.dumps(rows))


def test_a_part_without_a_row_has_a_line_and_no_section(tmp_path):
    axis = tokens.PART
    own, *others = axis.points
    rules_rows = rows_of([own], [0.1])
    write(tmp_path, rules.PART, rules_rows)
    assert sections.of_parts(None, tmp_path) == []
    line = sections._line(axis.name, axis.about, {}, axis.run_names, "#tokens")
    assert line.startswith("| `tokens` | More tokens: does") and line.endswith("| 0 of 4 | waits |")

    write(tmp_path, axis, rows_of(others[:1], [0.2], seeds=[0.0]))
    section = "\n".join(sections.of_parts(None, tmp_path))
    assert "### Tokens" in section and "### Size" not in section
    status = "2 of the 4 runs of `PART=tokens` have been trained. These wait: `dtop_p_x4` and "
    assert status + "`top2_x4` (seed 1)." in section.replace("\n", " ")
    assert "| the study's tokens | 2 | 4.0100 |" in section and "4 x the tokens" not in section
    assert "python -m" not in section

    write(tmp_path, axis, rows_of(others, [0.2, 0.3], seeds=[0.0]))
    assert "All 4 runs of `PART=tokens` have been trained." in sections.of_part(
        axis, None, tmp_path
    )


def test_seeds_that_wait_are_named():
    rows = {f"{name}-seed1": {} for name in granularity.PART.variants}
    del rows["top1_8e1a-seed1"]
    text = sections.status(granularity.PART, rows)
    assert text.startswith("5 of the 12 runs of `PART=granularity` have been trained. These wait: ")
    assert "`dtop_p_64e8a` and `top8_64e8a` (seed 2); `top1_8e1a` (seeds 1 and 2)." in text


def test_the_code_of_rows_is_named_with_what_was_not_committed():
    commits = ["013f4eb", "013f4ebe", "a5f3c6d+", "013f4ebe2"]
    rows = {f"dtop_p_x2-seed{n}": {"commit": commit} for n, commit in enumerate(commits, 1)}
    text = sections.status(tokens.PART, rows)
    assert text.endswith(
        "Code: commit 013f4eb (3), a5f3c6d+ (1); + is for changes that were not committed."
    )
    assert "not committed" not in sections.status(tokens.PART, {"a-seed1": {"commit": "013f4eb"}})


def test_all_seeds_of_a_variant_are_from_one_file():
    own = {"dtop_p-seed1": 1, "balance_1e1-seed1": 2}
    others = {"dtop_p-seed1": 3, "dtop_p-seed2": 4, "dtop_p_x2-seed1": 5}
    assert joined(own, others) == own | {"dtop_p_x2-seed1": 5}


@pytest.mark.parametrize(
    "leads, word", [((0.1, 0.3, 0.5), HOLDS), ((0.5, 0.3, 0.1), FAILS), ((0.1, 0.1, 0.1), UNCLEAR)]
)
def test_what_is_claimed_of_an_axis_is_judged_if_all_of_it_is_there(tmp_path, leads, word):
    axis = size.PART
    rows = rows_of(axis.points, leads)
    of_rules = {
        name: rows.pop(name) for name in list(rows) if name.startswith(("dtop_p-", "top2-"))
    }
    write(tmp_path, rules.PART, of_rules)
    write(tmp_path, axis, rows)
    claims = {cells[1]: cells for cells in sections.claims(None, tmp_path)}
    # The authors have no axis of the number of experts
    assert len(claims) == 3 + len(rules.CLAIMS)
    assert claims[axis.claim[0]][-1] == word
    assert claims[tokens.PART.claim[0]][-2:] == ["waits for `PART=tokens`", ""]
    del rows["top2_large-seed1"], rows["top2_large-seed2"]
    write(tmp_path, axis, rows)
    claims = {cells[1]: cells for cells in sections.claims(None, tmp_path)}
    assert claims[axis.claim[0]][-2] == "waits for `PART=size`"
    for cells in claims.values():
        assert cells[1] in document.text(None)


@pytest.mark.parametrize("without, word", [(5.3, HOLDS), (4.8, FAILS), (5.01, UNCLEAR), (None, "")])
def test_controller_and_normalization_are_judged_at_equal_counts(tmp_path, without, word):
    losses = {"dtop_p": 5.0, "no_drn": 5.2, "no_controller": without, "top2": 5.2}
    rows = {
        f"{name}-seed{seed}": {
            # What neither a variant nor a seed explains makes an interval of 0.011 to either side.
            "validation_loss": loss + 0.01 * seed + 0.01 * ((name, seed) == ("dtop_p", 2)),
            "validation_experts_per_token": 2.02,
        }
        for name, loss in losses.items()
        if loss is not None
        for seed in (1, 2)
    }
    write(tmp_path, rules.PART, rows)
    of_count, of_both, of_layers = sections.claims(None, tmp_path)[:3]
    assert of_count[-2:] == ["waits for `PART=rules`", ""]  # there is no fixed threshold
    assert of_both[1] == "Controller and normalization are both needed: at equal counts."
    assert of_both[-1] == word
    assert of_layers[1] == "By layer the loss is slightly worse: at equal counts."
    assert of_layers[-1] == ""
    by_layer = {
        name.replace("no_drn", "by_layer"): row for name, row in rows.items() if "no_drn" in name
    }
    write(tmp_path, rules.PART, rows | by_layer)
    of_layers = sections.claims(None, tmp_path)[2]
    assert of_layers[-1] == HOLDS and "DTop-p by layer (2.02 experts): -0.19" in of_layers[-2]
    if without is None:
        assert of_both[-2] == "waits for `PART=rules`"
    else:
        assert of_both[-2].startswith(
            "held-out loss less that of DTop-p without DRN (2.02 experts)"
        )
        assert f"threshold 0.222 (2.02 experts): {5.005 - without:+.4f} (" in of_both[-2]


def test_settings_stand_beside_dynamic_moes_tables():
    content = synthetic(top_p_04=[5.1, 5.11, 5.12])
    rows = {
        "dtop_p-seed1": {"validation_loss": 5.0, "threshold": 0.22, "busiest_load": 1.5},
        "dtop_p-seed2": {"validation_loss": 5.02},  # a row of the rules
        "z_1e3-seed1": {"validation_loss": 5.2, "threshold": 0.18, "busiest_load": 1.25},
        "top_p_05-seed1": {"validation_loss": 4.9, "validation_experts_per_token": 6.5},
    }
    lines = settings.table(rows, Results(content))
    assert lines[2].startswith("| balance 1e-2, dynamic 1e-3, no z-loss | 2 | 5.0100 | - | 0.220 |")
    assert lines[3].startswith(
        "| z-loss 1e-3 | 1 | 5.2000 | - | 0.180 | 1.25 | +0.2000 ("
    )  # against seed 1
    assert lines[3].endswith("| worse |") and lines[4] == ""  # nothing of those that wait
    assert "| p = 0.4 | 1.8 | 42.3 | 3 | 1.90 | 5.1100 | +0.1000 (" in lines[7]
    assert "| p = 0.5 | 2.3 | 42.8 | 1 | 6.50 | 4.9000 | -0.1" in lines[8]
    assert lines[8].endswith("| better |")
    # By seed: 5.21, 5.22, 5.23 against 5.01, 5.02, 5.03
    swept = "| top-2, p = 0.1 after training | 1.1 | 40.0 | 3 | 2.00 | 5.2200 | +0.2000 (+0.2000 "
    assert any(line.startswith(swept) for line in lines)
    assert settings.table(rows)[-1].endswith("| 3.9 | 42.8 | 0 | - | - | - |  |")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["part", "nonsense"], "PART=nonsense: use one of rules, budgets, granularity"),
        (["part"], "PART=: use one of rules"),
        (["part", "tokens", "--seeds", "0"], "--seeds is 0: use at least 1"),
        (["part", "tokens", "--jobs", "-1"], "--jobs is -1: use at least 1"),
        (["part", "diffusion", "--seeds", "0"], "--seeds is 0: use at least 1"),
        (["part", "tokens", "--only", "x"], "--only x: use one of dtop_p_x2"),
    ],
)
def test_plain_mistakes_get_plain_answers(flags, said):
    done = subprocess.run(
        [sys.executable, "-m", "study", *flags],
        cwd=fingerprint.ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode and said in done.stderr and "Traceback" not in done.stderr


def test_a_run_that_is_named_twice_is_planned_once():
    names = ["dtop_p_x2", "top2_x2"]
    twice = runs.plan(
        *(CPU, TEXT, "code", fingerprint.ROOT), variants=tokens.PART.variants, only=names * 2
    )
    assert [run.variant.name for run in twice] == names


@pytest.mark.distributed
@pytest.mark.megatron
@pytest.mark.long
def test_parts_train_measure_and_print(tmp_path):
    """With as many steps as a point has, and the measures that a part adds."""
    for module, run in (("tokens", "dtop_p_x2"), ("settings", "z_1e3")):
        done = subprocess.run(
            [
                *(sys.executable, "-m", f"study.{module}", "--quick"),
                *("--only", run, "--runs", str(tmp_path)),
            ],
            cwd=fingerprint.ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (row,) = json.loads((tmp_path / f"{module}.json").read_text()).values()
        assert 1 <= row["validation_experts_per_token"] <= 16 and row["validation_loss"] < 8
        # Two layers of experts of 64 in a model of 32, each token with 1 to 16 of them
        steps = 12 * (2 if module == "tokens" else 1)
        assert 1 <= row["expert_flops"] / (steps * 512 * 2 * 6 * 3 * 32 * 64) <= 16
        assert f"| 1 | {row['validation_loss']:.4f} |" in done.stdout
        if module == "settings":
            assert 0 < row["threshold"] < 1 <= row["busiest_load"]
    (folder,) = tmp_path.glob("dtop_p_x2-seed1-*")
    saved = int((folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert saved == 2 * SIZES["quick"].steps
