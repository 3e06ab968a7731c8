"""The planner's command line, and what it says."""

import json

import pytest

from megatron_dynmoe.cli.plan import main
from megatron_dynmoe.planning.gpus import GPUS

pytestmark = pytest.mark.megatron


def run(capsys, command: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(command.split())
    output = capsys.readouterr()
    code = exit.value.code
    return (code, output.out, output.err) if isinstance(code, int) else (1, "", str(code))


def plan(capsys, command: str) -> dict:
    return json.loads(run(capsys, f"{command} --json")[1])


def test_the_paper_model(capsys):
    code, text, _ = run(capsys, "dtop_p_16e --gpus 128 --gpu a800-80g")
    assert code == 0
    for words in (
        "3.489 B parameters, 581.9 M active at 2 experts per token (the target)",
        "pipeline 2 x data 64",
        "23,842 steps, 100 B tokens",
        "no measurement",
        "checkpoint  48.8 GB; the run keeps 48, 2.3 TB",
        "Fits with a balanced load.",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 110


def test_a_small_model_is_shown_in_small_units(capsys):
    text = run(capsys, "smoke --gpus 1 --gpu a800-80g")[1]
    assert "memory of a GPU, MB" in text and "less than 6 minutes" in text and "2.7 MB" in text


def test_figures_follow_from_each_other(capsys):
    found = plan(capsys, "dtop_p_16e --gpus 128 --gpu a800-80g --tokens 10e9 --utilization 0.5")
    assert found["steps"] == 2385 and found["tokens"] == 2385 * 2048 * 2048
    # 6 FLOPs a parameter and token but for the embedding, and attention.
    linear = 6 * (found["active_parameters"] - 32000 * 1024) * found["tokens"]
    attention = 6 * 24 * 1024 * 2048 * found["tokens"]
    assert found["flops"] == pytest.approx(linear + attention, rel=0.01)
    hours = found["flops"] / (128 * GPUS["a800-80g"].flops * 0.5) / 3600
    assert found["hours"] == pytest.approx(hours)
    weights, gradients, optimizer, activations, rows, update = found["mean"].values()
    most = max(activations + rows, update)
    assert found["mean_total"] == pytest.approx(weights + gradients + optimizer + most)
    assert found["checkpoint_bytes"] == 14 * found["parameters"]
    assert found["num_checkpoints"] == 5


def test_the_fixed_threshold_is_judged_by_its_first_steps(capsys):
    command = "topp_fixed_64e --gpus 16 --gpu a100-40g --micro-batch-size 2"
    found = plan(capsys, command)
    assert found["mean_total"] < found["first_steps_total"] < found["worst_case_total"]
    assert found["fits"] == (found["first_steps_total"] <= 40e9)


def test_what_does_not_fit_is_refused_with_what_would(capsys):
    code, text, _ = run(capsys, "dtop_p_16e --gpus 2 --gpu a100-40g")
    assert code == 1 and "Does not fit" in text
    remedies = [line.strip() for line in text.splitlines() if line.startswith("  --")]
    assert 1 <= len(remedies) <= 3
    for remedy in remedies:
        assert run(capsys, f"dtop_p_16e --gpus 2 --gpu a100-40g {remedy}")[0] == 0


def test_what_nothing_helps_says_so(capsys):
    code, text, _ = run(
        capsys, "dtop_p_64e8a --gpus 1 --gpu a100-40g --expert-model-parallel-size 1"
    )
    assert code == 1 and "Neither recomputation" in text


def test_the_worst_case_comes_with_the_cap_that_rules_it_out(capsys):
    command = "dtop_p_16e --gpus 8 --gpu a800-80g"
    cap = plan(capsys, command)["cap_that_fits"]
    flag = "--moe-dynamic-max-experts-per-token"
    assert f"{flag} {cap}" in " ".join(run(capsys, command)[1].split())
    assert plan(capsys, f"{command} {flag} {cap}")["worst_case_total"] <= 80e9
    assert plan(capsys, f"{command} {flag} {cap + 1}")["worst_case_total"] > 80e9


def test_where_no_cap_helps_what_does_is_tried(capsys):
    command = "dtop_p_64e8a --gpus 8 --gpu a800-80g"
    code, text, _ = run(capsys, command)
    assert code == 0 and "Any of these does:" in " ".join(text.split())
    remedies = [line.strip() for line in text.splitlines() if line.startswith("  --")]
    assert 1 <= len(remedies) <= 3
    for remedy in remedies:
        assert plan(capsys, f"{command} {remedy}")["worst_case_total"] <= 80e9
    smallest = "--micro-batch-size 1 --seq-length 32768 --max-position-embeddings 32768"
    smallest += " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    code, text, _ = run(capsys, f"{command} {smallest}")
    assert code == 0 and "nor more parallelism rule it out." in " ".join(text.split())


def test_a_dense_model_has_no_experts_to_speak_of(capsys):
    code, text, _ = run(capsys, "dense_374m --gpus 8 --gpu a800-80g")
    assert code == 0 and text.endswith("\nFits.\n") and "expert" not in text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("dtop_p_16e --gpus 7 --gpu a800-80g", "number of processes is 7"),
        ("dtop_p_16e --gpus 0 --gpu a800-80g", "number of processes is 0"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --num-experts 12 "
         "--expert-model-parallel-size 5", "--num-experts is 12"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --global-batch-size 30", "--global-batch-size is 30"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --recompute-granularity full", "granularity is full"),
        ("moe_top2 --gpus 8 --gpu a800-80g --moe-router-topk 17", "--moe-router-topk is 17"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --moe-layer-freq [0,1]", "each of the 24 layers"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --hidden-size 1000", "--hidden-size is 1000"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --tokens -1", "--tokens is -1"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --tokens nan", "--tokens is nan"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --tokens inf", "--tokens is inf"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --tokens 1e300", "more than 1e+18 tokens"),
        (f"dtop_p_16e --gpus 8 --gpu a800-80g --train-iters 1{'0' * 18}", "more than 1e+18"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --train-samples 9", "iteration-based training"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --step-batch-size-schedule 0:32", "schedule is 0:32"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --utilization 40", "--utilization is 40"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --utilisation 40", "--utilization is 40"),
        ("dtop_p_16e --gpus 8 --gpu a800-80g --moe-dynamic-threshold 0.4", "threshold is 0.4"),
    ],
)  # fmt: skip
def test_mistakes_are_misuse_and_told(capsys, command, words):
    """A plan that does not fit ends with 1."""
    code, _, error = run(capsys, command)
    assert code == 2 and words in error


def test_an_unknown_recipe_is_misuse(capsys):
    code, _, error = run(capsys, "dtop_16e --gpus 8 --gpu a800-80g")
    assert code == 2 and "did you mean dtop_p_16e" in error


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--num-layer 3", "there is no flag --num-layer: did you mean --num-layers?"),
        ("--rotary-percent high", "--rotary-percent is 'high': give a number."),
    ],
)
def test_a_flag_of_the_training_is_misuse_like_one_of_its_own(capsys, flags, says):
    code, _, error = run(capsys, f"dtop_p_16e --gpus 8 --gpu a800-80g {flags}")
    assert code == 2 and error == f"dynmoe plan: error: {says}\n"


@pytest.mark.parametrize("command", ["", "dtop_p_16e", "dtop_p_16e --gpus 8 --gpu v100"])
def test_usage(capsys, command):
    assert run(capsys, command)[0] == 2
