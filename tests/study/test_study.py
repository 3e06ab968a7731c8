"""The study's bookkeeping: what is trained, when it is trained again, what a result is."""

import dataclasses
import gzip
import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest

from study import (
    budgets,
    corpus,
    diffusion,
    document,
    fingerprint,
    influences,
    parts,
    results,
    rules,
    runs,
    sections,
    settings,
)
from study.claims import CLAIMS, FAILS, HOLDS, UNCLEAR, judge
from study.queue import alone
from study.results import Results
from study.variants import NUM_EXPERTS, SIZES, TARGET, VARIANTS, training_flags
from tests.helpers.fake_runs import dtop_p_scalars, make_run

CPU = SIZES["cpu"]
TEXT = corpus.Corpus("text", ["book"], None)


def plan(folder, code="code", **options):
    return runs.plan(CPU, TEXT, code, folder, **options)


def finish(run):
    run.folder.mkdir(parents=True)
    (run.folder / runs.KEY).write_text(json.dumps(run.key))
    (run.folder / "finished.json").write_text("{}")


def test_the_main_four_have_three_seeds_and_first_seeds_come_first(tmp_path):
    planned = plan(tmp_path)
    seeds = [run.seed for run in planned]
    assert seeds == sorted(seeds) and len(planned) == 4 * 3 + 7
    assert {run.variant.name for run in planned if run.seed == 3} == {
        "top2", "dtop_p", "top_p_04", "fixed_020",
    }  # fmt: skip
    assert len({run.folder for run in planned}) == len(planned)
    assert [run.name for run in plan(tmp_path, only=["top1", "dtop_p"], num_seeds=2)] == [
        "top1-seed1", "dtop_p-seed1", "dtop_p-seed2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--only top3: use one of top2, dtop_p"):
        plan(tmp_path, only=["top3"])


def test_a_run_is_trained_again_when_flags_data_or_code_change(tmp_path):
    (run,) = plan(tmp_path, only=["top1"])
    finish(run)
    assert plan(tmp_path, only=["top1"])[0].is_finished
    assert not plan(tmp_path, code="other", only=["top1"])[0].is_finished
    other_text = TEXT._replace(fingerprint="other")
    assert not runs.plan(CPU, other_text, "code", tmp_path, only=["top1"])[0].is_finished
    longer = dataclasses.replace(CPU, steps=2 * CPU.steps)
    assert not runs.plan(longer, TEXT, "code", tmp_path, only=["top1"])[0].is_finished


def test_any_code_takes_what_differs_in_nothing_else(tmp_path):
    (old,) = plan(tmp_path, code="old", only=["top1"])
    finish(old)
    (run,) = plan(tmp_path, code="new", only=["top1"], any_code=True)
    assert run.is_finished and run.folder == old.folder and run.key["code"] == "old"
    other_text = TEXT._replace(fingerprint="other")
    (run,) = runs.plan(CPU, other_text, "new", tmp_path, only=["top1"], any_code=True)
    assert not run.is_finished


def test_comments_and_docstrings_are_no_other_code(tmp_path):
    root = tmp_path / "package"
    shutil.copytree(
        fingerprint.ROOT / "megatron_dynmoe", root, ignore=shutil.ignore_patterns("__pycache__")
    )
    before = fingerprint.of_code(root)
    assert before == fingerprint.of_code()
    file = root / "routing" / "select.py"
    source = file.read_text()
    file.write_text("# a remark\n" + source.replace('"""', '"""Other words: ', 1))
    (root / "report.py").write_text("reads = 'what a training leaves'\n")
    assert fingerprint.of_code(root) == before
    file.write_text(source + "\nMORE = 1\n")
    assert fingerprint.of_code(root) != before


def test_flags_of_all_variants_are_accepted_settings():
    """A misspelled flag would be found hours into the study."""
    from argparse import ArgumentParser

    from megatron_dynmoe.settings.arguments import add_dynmoe_args, config_from_args

    parser = add_dynmoe_args(ArgumentParser())
    routings = {}
    for variant in VARIANTS.values():
        args, _ = parser.parse_known_args(training_flags(variant, CPU, 1))
        config = config_from_args(args).resolve(None if variant.name == "dense" else NUM_EXPERTS)
        routings[variant.name] = config
    assert routings["dtop_p"].target_experts_per_token.at(0) == TARGET
    assert routings["by_layer"].scope == "layer" and routings["no_drn"].normalization == "none"
    assert routings["top_p_04"].weights == "raw" and routings["fixed_020"].threshold == 0.2
    assert {c.balance_loss_coeff for c in routings.values() if c.is_dynamic} == {1e-2}
    parser.add_argument("--num-experts", type=int)
    parser.add_argument("--moe-router-score-function")
    with_parts = (rules.PART, budgets.PART, *sections.SCALING, settings.PART, influences.PART)
    for variants in (*(part.variants for part in with_parts), diffusion.VARIANTS):
        for variant in variants.values():
            args, _ = parser.parse_known_args(training_flags(variant, CPU, 1))
            config_from_args(args).resolve(args.num_experts)
            # Held-out text is read by the exported model, which no other scores have.
            assert args.moe_router_score_function is None, variant.name


def test_routings_of_images_are_compared_with_their_seeds_noise():
    def row(value):
        named = {name: value for name, *_ in diffusion.MEASURES}
        return named | {"times": [level / 10 for level in range(10)], "loss": [value] * 10}

    found = {"dtop_p-seed1": row(1.0), "dtop_p-seed2": row(1.2), "top2-seed1": row(3.0)}
    lines = diffusion.table(found)
    # One degree of freedom: 12.7062 standard errors, by Student's table.
    half = 12.7062 * 0.02**0.5
    assert lines[2].startswith(f"| DTop-p, target 2 | 2 | 1.10 ± {half / 2**0.5:.2f} |")
    assert lines[3].startswith(f"| top-2 | 1 | 3.00 ± {half:.2f} |")  # noise pooled, of one run
    assert lines[4] == "| fixed top-p 0.146 | 0 " + "| - " * len(diffusion.MEASURES) + "|"
    more = half * 1.5**0.5
    assert lines[8].startswith(f"| top-2 | -1.9000 ({-1.9 - more:.4f} to {-1.9 + more:+.4f}) |")
    assert lines[9] == "| fixed top-p 0.146 | - | - | - |"
    assert lines[11].startswith("| loss at time | seeds | 0.00 | 0.20 |")
    assert diffusion.table({})[2].startswith("| DTop-p, target 2 | 0 | - |")
    # Counts of top-2 never differ: they have no interval, and do not narrow that of the others.
    found |= {"top2-seed2": row(3.0)}
    lines = diffusion.table(found)
    assert lines[2].startswith(f"| DTop-p, target 2 | 2 | 1.10 ± {half / 2**0.5:.2f} |")
    assert lines[3].startswith("| top-2 | 2 | 3.00 | 3.00 |")


def test_rules_are_compared_seed_by_seed():
    losses = {"dtop_p": (4.0, 4.2), "top2": (4.3, 4.52), "relu": (3.0,)}
    found = {
        f"{name}-seed{seed}": {"validation_loss": loss, "validation_experts_per_token": 2.0}
        for name, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds, 1)
    }
    lines = rules.table(found)
    assert len(lines) == 2 + len(rules.VARIANTS)
    top2 = next(line for line in lines if line.startswith("| top-2 "))
    # The differences are 0.30 and 0.32, so the noise is 0.01, of one degree of freedom; 12.7062 is
    # of Student's table.
    half = 12.7062 * 0.01
    interval = f"({0.31 - half:+.4f} to {0.31 + half:+.4f})"
    assert f"| 2 | 4.4100 | 2.00 | - | +0.3100 {interval} | worse |" in top2
    relu = next(line for line in lines if "ReLU" in line)  # against seed 1 alone
    assert "| 1 | 3.0000 | 2.00 | - | -1.0000 (" in relu and relu.endswith("| better |")
    assert "| 0 | - | - | - | - |" in next(line for line in lines if "SeqTopK" in line)
    found["dtop_p-seed1"]["validation_loss"] = 4.1
    assert rules.table(found)[3].endswith("| not clear |")
    del found["relu-seed1"]
    found["relu-seed3"] = {"validation_loss": 3.0, "validation_experts_per_token": 2.0}
    (relu,) = (line for line in rules.table(found) if "ReLU" in line)
    assert relu.endswith("| 1 | 3.0000 | 2.00 | - | - |  |")  # no seed in common
    assert rules.differences(found).keys() == {"top2"}
    found["relu-seed3"]["expert_flops"] = 1.5e12
    found["relu-seed1"] = found["relu-seed3"] | {"expert_flops": 1.9e12}
    found["relu-seed2"] = found["dtop_p-seed2"]  # of which it is not known
    (relu,) = (line for line in rules.table(found) if "ReLU" in line)
    assert "| 2.00 | 1.7 |" in relu


def test_pairs_of_rules_are_compared_by_the_seeds_that_both_have():
    losses = {
        "dtop_p": (4.0, 4.2),
        "top2": (4.3, 4.52),
        "relu": (3.0, 3.2, 9.0),
        "by_layer": (4.0,),
    }
    found = {
        f"{name}-seed{seed}": {"validation_loss": loss}
        for name, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds, 1)
    }
    lines = rules.pairs(found)
    assert len(lines) == 2 + len(rules.PAIRS)
    of_relu, *_ = (line for line in lines if line.startswith("| ReLU | top-2 |"))
    # dtop_p and top2 have the noise of the test above; relu has other seeds.
    half = 12.7062 * 0.01
    assert of_relu == (
        f"| ReLU | top-2 | 2 | -1.3100 ({-1.31 - half:+.4f} to {-1.31 + half:+.4f}) | better |"
    )
    of_one, *_ = (line for line in lines if line.startswith("| ReLU | DTop-p by layer |"))
    assert of_one.startswith("| ReLU | DTop-p by layer | 1 | -1.0000 (")
    assert "| SeqTopK | top-2 | 0 | - |  |" in lines
    for names in rules.PAIRS:
        assert set(names) <= rules.VARIANTS.keys() - {rules.REFERENCE}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_shared_expert_is_one_of_two_experts_and_the_dense_layer_as_wide_as_both(size):
    for name in ("expert_threshold_shared", "top1_shared"):
        flags = training_flags(rules.VARIANTS[name], size, 1)
        last = dict(itertools.pairwise(flags))  # the last one counts
        assert last["--moe-shared-expert-intermediate-size"] == f"{size.ffn}"
        assert last["--moe-ffn-hidden-size"] == f"{size.ffn}"
        assert last["--ffn-hidden-size"] == f"{2 * size.ffn}"
        assert last["--moe-layer-freq"] == f"([0]+[1]*{int(last['--num-layers']) - 1})"


def test_without_controller_the_threshold_is_the_one_that_dtop_p_begins_with():
    from megatron_dynmoe.control import initial_threshold

    text = VARIANTS["no_controller"].flags
    threshold = float(text.split("--moe-dynamic-threshold ")[1])
    assert threshold == pytest.approx(initial_threshold(NUM_EXPERTS, TARGET), abs=1e-4)


def test_sizes_evaluate_at_the_end_and_scale_without_being_recorded():
    for size in SIZES.values():
        assert size.steps % size.num_evaluations == 0
    half = CPU.scaled(0.5)
    assert (half.steps, half.recorded) == (CPU.steps // 2, False)
    assert CPU.scaled(0.0001).steps == CPU.num_evaluations


def test_text_is_split_by_documents_and_the_split_is_the_end(tmp_path):
    file = tmp_path / "mine.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps({"text": f"document {n}"}) + "\n" for n in range(30))
    corpus._split(file, tmp_path / "a.gz", tmp_path / "b.gz")
    parts = [
        gzip.decompress((tmp_path / name).read_bytes()).splitlines() for name in ("a.gz", "b.gz")
    ]
    assert [len(part) for part in parts] == [28, 2]
    assert json.loads(parts[1][0]) == {"text": "document 28"}
    (tmp_path / "mine.txt").touch()
    for files, message in [
        ([tmp_path / "no.jsonl.gz"], "no such file"),
        ([file, tmp_path / "mine.txt"], "two files have the same name"),
    ]:
        with pytest.raises(ValueError, match=message):
            corpus.files_of([str(file) for file in files])


def test_text_is_read_again_where_a_run_needs_more(tmp_path):
    """Files without weights are read once, and the run ends in the middle of its steps."""
    for part, size in (("training", 60), ("held-out", 6)):
        for kind in ("code", "book"):
            path = tmp_path / f"{kind}-{part}_text_document.bin"
            path.write_bytes(bytes(size + len(kind)))
    flags = corpus.Corpus("text", ["code", "book"], tmp_path).flags()
    for flag, size in (("--train-data-path", "64"), ("--valid-data-path", "10")):
        blend = flags[flags.index(flag) + 1 :][:4]
        assert blend[::2] == [size, size] and "code" in blend[1] and "book" in blend[3]


@pytest.mark.parametrize(
    "experts, peak, held, worst",
    [
        ([3.0] * 5 + [2.0] * 20, (0.25, 10), 15, (0.0, 0.0)),
        ([3.0] * 5 + [2.0] * 9 + [2.3] + [2.0] * 5, (0.25, 10), 15, (0.015, 0.0)),
        # Single steps are off by 5 % by chance.
        ([2.1, 1.9] * 10, (0.0, 10), 10, (0.0, 0.05)),
        # A start at the target counts if it stays there, and not if it leaves it.
        ([2.0] * 10 + [2.5] + [2.0] * 10, (0.025, 11), 10, (0.025, 0.25)),
        ([2.0] * 10 + [3.0] * 5 + [2.0] * 20, (0.25, 15), 25, (0.0, 0.0)),
        # Passing the target is not to hold it.
        ([3.0] * 10 + [1.0] * 10 + [2.0] * 10, (0.5, 10), 30, (0.0, None)),
        # A little over 5 % once, later
        ([2.0] * 10 + [3.01] + [2.0] * 20, (0.0505, 11), 21, (0.0, 0.0)),
        ([2.0] * 10, (0.0, 10), 10, (0.0, None)),
        ([3.0] * 30, (0.5, 10), None, (None, None)),
        ([2.0] * 20 + [3.0] * 10, (0.5, 30), None, (None, None)),
        ([2.0] * 9, (None, None), None, (None, None)),
    ],
)
def test_settling(experts, peak, held, worst):
    found = results.settling(experts, 2.0)
    assert found["held_from_step"] == held and found["peak_step"] == peak[1]
    names = ("peak_excursion", "worst_excursion", "worst_step")
    for name, value in zip(names, (peak[0], *worst), strict=True):
        assert found[name] == (None if value is None else pytest.approx(value, abs=1e-9))


def test_a_row_holds_what_the_events_and_the_held_out_text_say(tmp_path):
    scalars = dtop_p_scalars() | {
        "dynmoe/validation_experts_per_token": [(10, 2.1), (20, 2.05)],
        "dynmoe/validation_std_experts_per_token": [(10, 0.9), (20, 0.8)],
    }
    held_out = {"validation_loss": 7.25, "validation_experts_per_token": 2.125}
    run = runs.Run(VARIANTS["dtop_p"], 2, {"code": "abc"}, tmp_path, CPU)
    make_run(tmp_path, {"routing": "dtop_p", "target_experts_per_token": "2"}, scalars)
    (tmp_path / runs.COMMIT).write_text("abc\n")
    run.add_times(5, 4.0)
    run.add_times(0, 9.0)  # stopped before the first step
    run.add_times(15, 6.0)
    row = results.row_of(run, held_out)
    assert row["processor_seconds_per_step"] == 0.5
    assert (row["variant"], row["seed"], row["commit"]) == ("dtop_p", 2, "abc")
    assert (row["steps"], row["tokens"], row["seconds_per_step"]) == (20, 640, 1.0)
    assert row | held_out == row
    assert row["most_experts_per_token"] == 5.0 and row["fewest_experts_per_token"] == 1.97
    assert row["held_from_step"] is None and row["peak_excursion"] == 1.5
    assert row["validation_curve"] == {
        "tokens": [320.0, 640.0],
        "experts": [2.1, 2.05],
        "std_experts": [0.9, 0.8],
    }
    assert len(row["curve"]["experts"]) == 20


def synthetic(**losses):
    """Results in which only the losses matter; ``name=[a loss a seed]`` overrides."""
    defaults = {
        name: [5.0 + 0.01 * seed for seed in range(variant.num_seeds)]
        for name, variant in VARIANTS.items()
    }
    rows = [
        {
            "variant": name,
            "commit": "abc",
            "seed": seed,
            "steps": 100,
            "tokens": 1000,
            "validation_loss": loss,
            "expert_flops": 1e9,
            "seconds_per_step": 1.0 + 0.01 * seed,
            "processor_seconds_per_step": 1.0 + 0.01 * seed,
            "experts_per_token": 2.0,
            "std_experts_per_token": 0.5,
            "validation_experts_per_token": 1.9,
            "validation_std_experts_per_token": 0.5,
            "fewest_experts_per_token": 1.0,
            "most_experts_per_token": 3.0,
            "peak_excursion": 0.3,
            "peak_step": 12,
            "held_from_step": 15,
            "worst_excursion": 0.04,
            "worst_step": 0.08,
            "experts_by_layer": [1.0, 2.0, 2.5, 2.5],
            "curve": {
                column: [2.0 if name == "dtop_p" else 3.0 - number / 4 for number in range(5)]
                for column in ("tokens", "experts", "std_experts", "threshold")
            },
            "validation_curve": {"tokens": [1], "experts": [2], "std_experts": [0.5]},
        }
        for name, values in (defaults | losses).items()
        for seed, loss in enumerate(values, 1)
    ]
    post_hoc = [
        {"seed": seed, "threshold": threshold, "experts": 2.0, "loss": loss + seed / 100}
        for seed in (1, 2, 3)
        for threshold, loss in ((None, 5.0), (0.1, 5.2), (0.17, 5.1))
    ]
    correlation = {"value": 0.3, "low": 0.2, "high": 0.4}
    analysis = {
        "variant": "top_p_04",
        "experts_by_source": {"book": 1.9, "code": 1.7},
        "experts_by_layer": [1.0, 2.5],
        "correlation_with_loss": correlation,
        "frequent_tokens": 500,
        "words_among_most": 0.1,
        "words_among_fewest": 0.5,
        "most": ["a"],
        "fewest": ["b|c"],
    }
    head = {"date": "2000-01-01", "machine": "none"}
    return head | {"runs": rows, "post_hoc": post_hoc, "analysis": [analysis]}


def verdict(text, content):
    (claim,) = (claim for claim in CLAIMS if claim.text.startswith(text))
    found = judge(claim, Results(content))
    return None if found is None else found.word


def test_a_difference_counts_against_the_spread_over_seeds():
    # The spread is 0.01; two standard errors of three seeds against one: 0.0231.
    compared = Results(synthetic()).compare("top2", "dense")
    assert compared.error == pytest.approx(2 * 0.01 * math.sqrt(1 / 3 + 1))
    claim = "Experts beat a dense model"
    assert verdict(claim, synthetic(dense=[5.04])) == HOLDS
    assert verdict(claim, synthetic(dense=[5.03])) == UNCLEAR
    assert verdict(claim, synthetic(dense=[4.98])) == FAILS
    both = "Controller and normalization are both"
    assert verdict(both, synthetic(no_drn=[5.1], no_controller=[5.1])) == HOLDS
    assert verdict(both, synthetic(no_drn=[5.1], no_controller=[5.01])) == UNCLEAR
    assert verdict(both, synthetic(no_drn=[5.1], no_controller=[4.9])) == FAILS


def rows_of(content, variant):
    return [row for row in content["runs"] if row["variant"] == variant]


def test_claims_about_layers_and_tokens():
    content = synthetic()
    assert verdict("Bottom layers need more", content) == FAILS
    assert verdict("Shallow layers use fewer", content) == HOLDS
    assert verdict("Tokens that use most", content) == HOLDS
    assert verdict("Harder input", content) == HOLDS
    for row in content["runs"]:
        row["experts_by_layer"] = row["experts_by_layer"][::-1]
    (analysis,) = content["analysis"]
    analysis["correlation_with_loss"] = {"value": -0.3, "low": -0.4, "high": -0.2}
    # Two standard errors of 10 % and 15 % of 100 tokens each are 9 %.
    analysis["words_among_fewest"] = 0.15
    assert verdict("Bottom layers need more", content) == HOLDS
    assert verdict("Harder input", content) == FAILS
    assert verdict("Tokens that use most", content) == UNCLEAR
    # Seeds that differ: halves apart by -1, 0.1 and 0.2
    for row, high in zip(rows_of(content, "top_p_04"), (3.0, 1.9, 1.8), strict=True):
        row["experts_by_layer"] = [2.0, 2.0, high, high]
    assert verdict("Bottom layers need more", content) == UNCLEAR


def test_a_count_falls_by_more_than_its_seeds_differ():
    claim, content = "The number of experts falls", synthetic()
    assert verdict(claim, content) == HOLDS
    for row, last in zip(rows_of(content, "top_p_04"), (2.0, 2.9, 3.2), strict=True):
        row["curve"]["experts"] = [3.0, 9.0, 9.0, 9.0, last]
    assert verdict(claim, content) == UNCLEAR
    for row in rows_of(content, "top_p_04"):
        row["curve"]["experts"] = [1.8, 2.5, 2.0, 1.9, 1.9]
    assert verdict(claim, content) == FAILS


def test_a_count_locks_early_in_all_seeds_and_a_fixed_threshold_drifts():
    claim = "The count locks"
    assert verdict(claim, synthetic()) == HOLDS
    late = synthetic()
    for row in late["runs"]:
        row["held_from_step"] = 21
    assert verdict(claim, late) == FAILS
    once = synthetic()
    rows_of(once, "dtop_p")[0]["held_from_step"] = None
    assert verdict(claim, once) == UNCLEAR
    steady = synthetic()
    for row in rows_of(steady, "fixed_020"):
        row["curve"]["experts"] = [3.0, 2.0, 2.1, 2.0, 2.09]
    assert verdict(claim, steady) == FAILS


def test_a_threshold_after_the_fact_is_worse_by_more_than_seeds_differ():
    claim, content = "Top-2 with a threshold after", synthetic()
    assert verdict(claim, content) == HOLDS
    for point in content["post_hoc"]:
        if point["threshold"] == 0.17:
            point["loss"] = 5.0 + (0.03 if point["seed"] == 1 else 0.01)
    assert verdict(claim, content) == UNCLEAR


def test_losses_stand_beside_what_they_were_paid_with():
    (claim,) = (claim for claim in CLAIMS if claim.text.startswith("DTop-p beats"))
    content = synthetic()
    for row in rows_of(content, "fixed_020"):
        row |= {"validation_experts_per_token": 2.75, "expert_flops": 3.21e12}
    numbers = judge(claim, Results(content)).numbers
    assert "5.0100 (fixed top-p 0.2; 2.75 experts, 3.2 TFLOP)" in numbers


def test_what_was_not_trained_is_not_judged():
    content = synthetic()
    content["runs"] = [row for row in content["runs"] if row["variant"] != "dense"]
    assert verdict("Experts beat a dense model", content) is None
    assert verdict("Two experts beat one", content) is not None
    assert verdict("Harder input", content | {"analysis": []}) is None
    assert "Not trained yet, wholly or in part: dense." in document.text(Results(content))


def test_the_page_with_results_has_every_claim_and_every_routing(tmp_path):
    from study.figures import draw_all

    results.write(tmp_path, "cpu", synthetic())
    read = Results.read(tmp_path / "cpu.json")
    assert read.content == synthetic()
    table = (tmp_path / "cpu.csv").read_text().splitlines()
    assert len(table) == 20 and "curve" not in table[0]
    page = document.text(read)
    assert "not run yet" not in page
    for claim in CLAIMS:
        assert claim.text in page
    assert "2000-01-01, trained at commit abc, none." in page
    assert "| top-2 | 3 | 5.0100 (0.0100) |" in page
    assert "b\\|c" in page and "| experts, code | 1.70 |" in page
    assert "| DTop-p, target 2 | 3 | 30.0 % at 12 | 15 | 4.0 % | 8.0 % |" in page
    pictures = draw_all(read, tmp_path)
    assert {path.name for path in pictures} == {
        f"study_{name}.png" for name in ("loss", "experts", "layers", "post_hoc")
    }
    for picture in pictures:
        assert f"(images/{picture.name})" in page


def test_the_page_shows_the_pictures_that_are_written(tmp_path, monkeypatch):
    """Of the results that are kept, into another folder."""
    monkeypatch.setattr(document, "DOCUMENT", tmp_path / "study.md")
    monkeypatch.setattr(document, "IMAGES", tmp_path)
    written = document.write(Results.read(results.RESULTS / "cpu.json"))
    page = (tmp_path / "study.md").read_text()
    shown = set(re.findall(r"!\[.+\]\(images/(.+)\)", page))
    assert shown == {path.name for path in written} - {"study.md", "study_budgets.png"}
    assert {"study_rules.png", "study_leads.png"} <= shown
    for name in shown:
        assert (tmp_path / name).stat().st_size > 10_000
        assert (fingerprint.ROOT / "docs" / "images" / name).is_file()


def test_an_older_claim_points_to_the_one_at_equal_counts():
    page = document.text(Results(synthetic()))
    assert page.count("(See: at equal counts.)") == len(rules.CLAIMS) == 3
    assert "DTop-p beats top-k and fixed top-p. (See: at equal counts.)" in page


def test_numbers_are_kept_with_five_digits():
    rounded = results._rounded({"a": [1.23456789, np.float64(2e-7)], "b": (3, None)})
    assert rounded == {"a": [1.2346, 2e-7], "b": [3, None]}


def test_two_studies_never_share_a_folder(tmp_path):
    with alone(tmp_path), pytest.raises(ValueError, match=f"another study runs in {tmp_path}"):
        parts.main(budgets.PART, ["--quick", "--runs", str(tmp_path)])
