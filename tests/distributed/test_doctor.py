"""The doctor's look into checkpoints of many layouts, of both formats, and of untrained models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dynmoe.data.finding import FAILED, PASSED
from megatron_dynmoe.doctor.checkpoint.look import look
from tests.distributed import test_resume as resume
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add
from tests.distributed.selection import matrix

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

SAVED = (
    *(resume.PP2EP2, resume.INTERLEAVED, resume.EP2_BF16, resume.TP2_PADDED, resume.TOP_K_RUN),
    *(resume.DIST_DP2, resume.DIST_DP2_HALF, resume.DIST_DENSE_FIRST, resume.DIST_EP2_BF16),
    *(resume.OTHER_TARGET, *resume.OTHER_LAYOUT["ep2_bf16 to one"][1:]),
)
MODEL = f"{TINY} {DTOP_P} --num-experts 4 --train-iters 1 --save-interval 1 --split 1,0,0"
ODD = (
    "--moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate --qk-layernorm "
    "--moe-layer-freq [0,1,1,1] --moe-dynamic-scope layer"
)
RANK_FILES = "--ckpt-format torch"


def fresh(name: str, layout: str, flags: str) -> Case:
    """A run that saves before its first step, and after it."""
    num_ranks, layout_flags = resume.LAYOUTS[layout]
    flags = f"{MODEL} {layout_flags} {flags} --save {{dir}}/fresh_{name}"
    return add(
        Case(f"fresh_{name}", num_ranks, flags, hooks=(f"{resume.__name__}:saved_as_loaded",))
    )


FRESH = {
    "pp2ep2": fresh("pp2ep2", "pp2ep2", ODD),
    "bf16": fresh("bf16", "ep2", "--bf16 --use-distributed-optimizer"),
    "tp2": fresh("tp2", "tp2", ODD),
    "rank files, pp2ep2": fresh("pp2ep2_torch", "pp2ep2", f"{ODD} {RANK_FILES}"),
    "rank files, interleaved, bf16": fresh(
        "interleaved_torch", "interleaved", f"{RANK_FILES} --bf16"
    ),
    "rank files, tp2": fresh("tp2_torch", "tp2", f"{ODD} {RANK_FILES}"),
}
RANK_FILES_OF_FOUR = FRESH["rank files, pp2ep2"]


@pytest.mark.parametrize(
    "case", matrix(SAVED, [case.name for case in SAVED if case is not resume.DIST_EP2_BF16])
)
def test_runs_are_clean(results: Results, case: Case) -> None:
    checks = look(results[case].directory / case.name)
    assert [check for check in checks if check.state != PASSED] == []


@pytest.mark.parametrize(
    "name",
    matrix(
        FRESH,
        ("pp2ep2", "rank files, pp2ep2", "rank files, interleaved, bf16", "rank files, tp2"),
    ),
)
@pytest.mark.parametrize("iteration", [0, 1])
def test_models_that_were_just_made_are_clean(results: Results, name: str, iteration: int) -> None:
    result = results[FRESH[name]]
    checks = look(result.directory / result.case.name / f"iter_{iteration:07d}")
    assert [check for check in checks if check.state != PASSED] == []
    said = {check.name: check.found for check in checks}
    num_sparse = 3 if "moe-layer-freq" in result.case.flags else 4
    assert f"4 layers, {num_sparse} of them with 4 experts" in said["layers and experts"]
    assert ("no batch measured" in said["router state"]) is (iteration == 0)


# -- faults of files of ranks ---------------------------------------------------------------------


def one_ranks_experts(folder: Path) -> None:
    for stage in ("000", "001"):
        source = folder / f"mp_rank_00_{stage}_000" / "model_optim_rng.pt"
        shutil.copy(source, folder / f"mp_rank_00_{stage}_001" / source.name)


def one_stages_layers(folder: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        source = folder / "mp_rank_00_000_000" / "model_optim_rng.pt"
        others = torch.load(source, weights_only=False)["model"]
        # The first layer of that stage has no experts.
        change = {name: others[name] for name in state["model"] if "layers.1." in name}
        state["model"] |= change

    edit(folder / "mp_rank_00_001_000" / "model_optim_rng.pt", change)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def in_one_file(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "mp_rank_00_001_001" / "model_optim_rng.pt", change)


def a_file_of_another_iteration(folder: Path) -> None:
    name = Path("mp_rank_00_001_001") / "model_optim_rng.pt"
    shutil.copy(folder.with_name("iter_0000000") / name, folder / name)


def without_a_rank(folder: Path) -> None:
    for stage in ("000", "001"):
        shutil.rmtree(folder / f"mp_rank_00_{stage}_001")


def flipped(folder: Path) -> None:
    path = folder / "mp_rank_00_001_001" / "model_optim_rng.pt"
    numbers = torch.load(path, weights_only=False)["model"]["decoder.layers.0.mlp.router.weight"]
    data = bytearray(path.read_bytes())
    data[data.index(numbers.numpy().tobytes()) + 9] ^= 1
    path.write_bytes(data)


def cut(folder: Path) -> None:
    path = folder / "mp_rank_00_001_001" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-3000])


ROUTER, EXPERTS = "decoder.layers.1.mlp.router.", "decoder.layers.0.mlp.experts.weight1"
FAULTS = {
    "one rank's experts": (one_ranks_experts, "copies", "experts 2, 3 are copies of experts 0, 1"),
    "one stage's layers": (one_stages_layers, "copies", "layer 3 holds copies of layer 1"),
    "zeros": (
        in_one_file(lambda state: state["model"][EXPERTS][1].zero_()),
        *("values", "weight1 of layer 2, expert 3 is all zero (mp_rank_00_001_001/model"),
    ),
    "NaN": (
        in_one_file(lambda state: state["model"][EXPERTS][1, 0, 0].fill_(torch.nan)),
        *("values", "weight1 of layer 2, expert 3 holds NaN"),
    ),
    "a NaN of the optimizer": (
        in_one_file(lambda state: state["optimizer"][1]["state"][0]["exp_avg"].fill_(torch.nan)),
        *("values", "optimizer.1.state.0.exp_avg holds NaN"),
    ),
    "another replica": (
        in_one_file(lambda state: state["model"][ROUTER + "weight"].mul_(1.5)),
        *("values", "differs between mp_rank_00_001_000/"),
    ),
    "a step that lags": (
        in_one_file(lambda state: state["optimizer"][1]["state"][0]["step"].zero_()),
        *("progress", "the optimizers' steps differ: 0 in mp_rank_00_001_001/"),
    ),
    "without a tensor": (
        in_one_file(lambda state: state["model"].pop(EXPERTS)),
        *("layers and experts", "weight1 of layer 2: expert 2, 3 is missing"),
    ),
    "another threshold": (
        in_one_file(lambda state: state["model"][ROUTER + "threshold"].mul_(0.9)),
        *("router state", "are not of one step"),
    ),
    "another iteration": (a_file_of_another_iteration, "files", "is of iteration 0, "),
    "without a rank": (without_a_rank, "files", "there is no file of expert-parallel rank 1"),
    "a bit": (flipped, "files", "does not have its checksum"),
    "cut": (cut, "files", "mp_rank_00_001_001/model_optim_rng.pt is damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(results: Results, tmp_path: Path, name: str) -> None:
    plant, check, words = FAULTS[name]
    result = results[RANK_FILES_OF_FOUR]
    run = shutil.copytree(result.directory / result.case.name, tmp_path / "run")
    plant(run / "iter_0000001")
    failed = [one for one in look(run) if one.state == FAILED]
    assert any(one.name == check and words in one.found for one in failed), failed
    assert all(one.remedy for one in failed)
