"""Dry runs of a small model: what they find in our code, and in our code with mistakes in it.

Every recipe as it stands is in ``test_recipes.py``, which takes minutes.
"""

import re
import shutil
from pathlib import Path

import pytest

import megatron_dynmoe
from megatron_dynmoe.dry_run import display, launch
from megatron_dynmoe.planning.gpus import GPUS

pytestmark = [pytest.mark.megatron, pytest.mark.slow]
# Expert and data parallelism, with everything that the recipes overlap.
SPREAD = (
    "--num-layers 2 --expert-model-parallel-size 2 --use-distributed-optimizer --bf16 "
    "--overlap-grad-reduce --overlap-param-gather"
)
ONE_RANK = (
    "--num-layers 2 --bf16 --moe-dynamic-max-experts-per-token 4 "
    "--moe-dynamic-row-buffer worst_case"
)
GROUP = "torch.distributed.group.WORLD"
# What is planted, in which file, after which line of it.
ITEM = ("moe/router.py", "weights_TE = routed.weights_TE", "weights_TE.sum().item()")
ON_CPU = (
    "moe/dispatch.py",
    "self.probs, self.routing_map = probs, routing_map",
    "torch.arange(len(routing_map), device='cpu')",
)
# In a function that may make something else on the host, and a single number.
ON_CPU_TOO = (
    "moe/grouped_linear.py",
    "grad = grad.contiguous()",
    "torch.arange(3, device='cpu')",
)
NUMBER = (
    "moe/dispatch.py",
    "self.probs, self.routing_map = probs, routing_map",
    "torch.zeros((), device='cpu')",
)
ALL_REDUCE = (
    "moe/router.py",
    "fractions_BE = self._fractions(assignments_BE, tokens_B)",
    f"torch.distributed.all_reduce(routed.entropy.detach().clone(), group={GROUP})",
)
PLANTED = (ITEM, ON_CPU, ON_CPU_TOO, NUMBER, ALL_REDUCE)


def dry_run(flags, gpus, kernels):
    return launch.dry_run("smoke", flags.split(), gpus, GPUS["h200-141g"], kernels=kernels)


@pytest.fixture(scope="module")
def spread():
    """Rank 0 of four, two of which share their experts, in plain PyTorch."""
    return dry_run(SPREAD, 4, "0")


@pytest.fixture(scope="module")
def alone():
    """One GPU that has room for the worst case, with Triton's kernels."""
    return dry_run(ONE_RANK, 1, "1")


@pytest.fixture(scope="module")
def fused():
    """The same with fused experts."""
    return dry_run(ONE_RANK, 1, "fused")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The first of these dry runs, of a copy of the package with a few mistakes.

    Returns:
        It, and the file and line of each mistake.
    """
    folder = tmp_path_factory.mktemp("planted")
    package = Path(megatron_dynmoe.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / package.name, symlinks=True, ignore=ignored)
    for file, after, mistake in PLANTED:
        _plant(folder / package.name / file, after, mistake)
    lines = {
        mistake: f"{file}:{_line_of(folder / package.name / file, mistake)}"
        for file, _, mistake in PLANTED
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # from which `python -m` imports first
        patch.setenv("PYTHONPATH", str(folder))
        return dry_run(SPREAD, 4, "0"), lines


def _plant(path, after, mistake):
    lines = path.read_text().splitlines(keepends=True)
    (at,) = [number for number, line in enumerate(lines) if line.strip() == after]
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    path.write_text("".join([*lines[: at + 1], f"{indent}{mistake}\n", *lines[at + 1 :]]))


def _line_of(path, text):
    """The number of a line, from 1."""
    (number,) = [n for n, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    return number


def least_traffic(run):
    """How many times the bytes that experts must move they move."""
    return run.result.expert_traffic / run.least_expert_traffic


def waits_in_layers(run):
    return [wait for wait in run.result.waits if wait.per.startswith("layer")]


def test_no_tensor_of_a_step_is_off_the_device_but_those_of_a_list(spread, alone):
    for run in (spread, alone):
        assert run.result.mistakes == []
        assert "MISTAKE" not in display.describe(run)
    assert {made.why for made in spread.result.off_device} >= {"counts of rows", "the batch"}


def test_the_host_waits_once_a_layer_for_the_counts(spread):
    (wait,) = waits_in_layers(spread)
    assert (wait.count, wait.per, wait.per_step) == (1, "layer and micro-batch", 2 * 2)
    assert wait.caller.startswith("megatron_dynmoe/moe/dispatch.py:")


def test_with_room_for_the_worst_case_it_never_waits_in_a_layer(alone):
    assert waits_in_layers(alone) == []


def test_the_planner_is_near(spread, alone):
    for run in (spread, alone):
        assert run.formula.total == pytest.approx(run.result.peak, rel=0.1)


def test_flops_are_those_of_the_planner(spread):
    assert sum(spread.result.flops.values()) == pytest.approx(spread.planned_flops, rel=0.05)


def test_fused_experts_keep_less_and_take_fewer_kernels(alone, fused):
    assert fused.result.mistakes == [] and waits_in_layers(fused) == []
    assert fused.result.peak_bytes["forward"] < alone.result.peak_bytes["forward"]
    assert sum(fused.result.flops.values()) == sum(alone.result.flops.values())
    limits = {"dispatch, combine": (9, 3), "experts": (4, 7)}
    assert least_traffic(fused) < 1.15 < 1.3 < least_traffic(alone)
    assert 0 < fused.result.expert_kept < 0.75 * alone.result.expert_kept
    for row in fused.result.kernels:
        most = limits.get(row.part, (row.forward, row.backward))
        assert row.forward <= most[0] and row.backward <= most[1], row


def test_rows_without_a_token_are_computed_too(alone):
    """With room for the worst case; Megatron's formula counts those of tokens."""
    assert sum(alone.result.flops.values()) > 1.5 * alone.planned_flops


def test_kernels_of_both_settings_are_counted(spread, alone):
    router = {
        run.kernels: next(row for row in run.result.kernels if row.part == "router")
        for run in (spread, alone)
    }
    assert "routing_triton" in router["1"].files and "routing_triton" not in router["0"].files
    assert router["1"].forward < router["0"].forward


def test_kernels_do_not_creep_back(alone):
    """Of a layer with a cap, a micro-batch; the step's are the controller's and Megatron's own.

    A limit may fall. If one has to rise, the commit says why.
    """
    forward = {row.part: row.forward for row in alone.result.kernels}
    limits = {"router": 30, "dispatch, combine": 12, "experts": 7, "attention": 5}
    assert {part: forward[part] for part, limit in limits.items() if forward[part] > limit} == {}
    assert sum(forward.values()) <= 58
    assert sum(row.backward for row in alone.result.kernels) <= 60
    between = alone.result.kernels_between
    assert sum(between.values()) == alone.result.kernels_per_step["the rest"] <= 50
    assert 0 < alone.result.kernels_of_controller <= 30
    # AdamW needs no temporaries.
    result = alone.result
    assert result.peak_bytes["optimizer"] - result.state_bytes < 0.01 * result.state_bytes
    # The gradient's norm: one, whatever the number of parameters.
    norms = [wait for wait in alone.result.waits if "clip_grads" in wait.line + wait.caller]
    assert [wait.per_step for wait in norms] == [1]


def test_who_holds_memory_is_named_by_file_and_line(spread):
    result = spread.result
    for phase, peak in result.peak_bytes.items():
        sizes = [each.num_bytes[phase] for each in result.holders if phase in each.num_bytes]
        assert len(sizes) > 3 and 0.5 * peak < sum(sizes) <= peak
    for holder in result.holders:
        file, _, line = holder.line.rpartition(":")
        assert file.startswith("megatron") and line.isdecimal()


def test_what_is_sent_by_whom_and_who_waits_for_it(spread):
    sent = {(each.kind, each.group): each for each in spread.result.sent}
    rows = sent["all-to-all", "EXPERT_MODEL_PARALLEL_GROUP"]
    # Rows and their weights there, rows back, and the same of the gradients.
    assert rows.size == 2 and rows.calls % 4 == 0
    gradients = [each for each in spread.result.sent if each.kind == "reduce-scatter"]
    assert {each.is_async for each in gradients} == {True} and all(e.awaited for e in gradients)
    # The controller's counts: one for all layers.
    (counts,) = [each for each in spread.result.sent if "control/update.py" in each.line]
    assert (counts.kind, counts.size, counts.calls) == ("all-reduce", 4, 1)


def test_the_text_says_units_that_suit_and_last_what_it_cannot_see(spread):
    *_, verdict, last = display.describe(spread).splitlines()
    assert re.fullmatch(r"Fits: [1-9][\d.]* [kM]B of 141 GB\.", verdict)
    assert last == display.NOT_SEEN


def test_a_planted_item_is_found_and_named(planted, spread):
    run, lines = planted
    assert len(waits_in_layers(run)) == 2
    (wait,) = [wait for wait in waits_in_layers(run) if wait.call == "item"]
    _is_named(wait, lines[ITEM[2]], run)
    assert wait.per_step == 4


def test_a_planted_tensor_on_the_cpu_is_found_and_named(planted):
    run, lines = planted
    mistakes = {mistake.line: mistake for mistake in run.result.mistakes}
    # The experts' function is called from two lines.
    assert (len(mistakes), len(run.result.mistakes)) == (3, 4)
    # A step has two layers and two micro-batches.
    for planted_one, made, per_step in (
        (ON_CPU, "arange [32]", 4),
        (ON_CPU_TOO, "arange [3]", 4),
        (NUMBER, "zeros []", 4),
    ):
        mistake = mistakes[f"megatron_dynmoe/{lines[planted_one[2]]}"]
        _is_named(mistake, lines[planted_one[2]], run)
        assert (mistake.made, mistake.per_step) == (made, per_step)


def test_a_planted_all_reduce_is_found_and_named(planted, spread):
    run, lines = planted
    (extra,) = [each for each in run.result.sent if "moe/router.py" in each.line]
    assert not [each for each in spread.result.sent if "moe/router.py" in each.line]
    _is_named(extra, lines[ALL_REDUCE[2]], run)
    assert (extra.kind, extra.size, extra.calls) == ("all-reduce", 4, 4)


def _is_named(found, line, run):
    """It is of this line, which stands in the text, too."""
    assert found.line == f"megatron_dynmoe/{line}"
    assert line in display.describe(run)
