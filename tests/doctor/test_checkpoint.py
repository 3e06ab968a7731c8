"""The doctor's look into checkpoints: healthy ones are clean, each planted fault is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dynmoe.conversion.convert import Target, from_hf, to_hf
from megatron_dynmoe.data.finding import FAILED, PASSED, WARNING, Check
from megatron_dynmoe.doctor.__main__ import main
from megatron_dynmoe.doctor.checkpoint.look import _few, look
from megatron_dynmoe.storage.manifest import MANIFEST, write_manifest
from megatron_dynmoe.storage.megatron_names import TRACKER
from tests.conversion.checkpoints import DTOP_P, TOP_K, TOP_P, model_config, write_megatron
from tests.doctor.planting import change_common, drop, edit, read

FIXTURES = Path(__file__).parents[1] / "fixtures"
FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"  # [2, 4, 32, 16]
FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"  # [2, 4, 16, 16]
PROJ = "decoder.layers.self_attention.linear_proj.weight"
NORM = "decoder.final_layernorm.weight"
ROUTER = "decoder.layers.mlp.router."
MASTER = "optimizer.state.param."
EXP_AVG = "optimizer.state.exp_avg."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Iteration 4 of a run of 2 layers with 4 experts each, PP 2 x EP 2, DTop-p."""
    return shutil.copytree(FIXTURES / "run", tmp_path / "run") / "iter_0000004"


def failed(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.state == FAILED]


def assert_clean(checks: list[Check]) -> None:
    assert [check for check in checks if check.state != PASSED] == []


def copy_expert(folder: Path, layer: int, source: int, target: int) -> None:
    """In the model and in the optimizer's own copy of it."""
    for key in (FC1, FC2, MASTER + FC1, MASTER + FC2):
        edit(folder, key, lambda whole: whole[layer, target].copy_(whole[layer, source]))


# -- healthy ones ---------------------------------------------------------------------------------


def test_a_training_checkpoint_is_clean(folder: Path) -> None:
    for path in (folder, folder.parent):
        checks = look(path)
        assert_clean(checks)
        assert len(checks) == 9
    assert "experts 0 to 3 differ" in next(c.found for c in checks if c.name == "copies")


def test_an_exported_folder_is_clean() -> None:
    assert_clean(look(FIXTURES / "exported"))


SHARED = {"shared_expert_intermediate_size": 6, "shared_expert_gate": True}
DENSE_FIRST = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [TOP_P, DTOP_P, TOP_K, DTOP_P | SHARED | DENSE_FIRST, TOP_K | {"tie_word_embeddings": True}],
)
def test_converted_checkpoints_are_clean(tmp_path: Path, settings: dict, dtype: str) -> None:
    load = write_megatron(tmp_path / "load", model_config(**settings), dtype)
    assert_clean(look(load))
    to_hf(load, Target(tmp_path / "hf", max_shard_size=3000))
    assert_clean(look(tmp_path / "hf"))
    from_hf(tmp_path / "hf", tmp_path / "back", progress=False)
    assert_clean(look(tmp_path / "back"))


@pytest.mark.parametrize("format", ["dynamic-moe", "mixtral"])
def test_other_formats_are_clean(tmp_path: Path, format: str) -> None:
    settings = TOP_P if format == "dynamic-moe" else TOP_K
    load = write_megatron(tmp_path / "load", model_config(**settings))
    to_hf(load, Target(tmp_path / "hf", format=format))
    assert_clean(look(tmp_path / "hf"))


# -- planted faults -------------------------------------------------------------------------------


def one_expert(folder: Path) -> None:
    copy_expert(folder, 1, 0, 3)


def one_rank(folder: Path) -> None:
    for layer in (0, 1):
        for expert in (0, 1):
            copy_expert(folder, layer, expert, expert + 2)


def one_layer(folder: Path) -> None:
    for key in (PROJ, MASTER + PROJ):
        edit(folder, key, lambda whole: whole[1].copy_(whole[0]))


def moments_of_one_expert(folder: Path) -> None:
    """Everything but the weights."""
    for key in (EXP_AVG + FC1, "optimizer.state.exp_avg_sq." + FC2):
        edit(folder, key, lambda whole: whole[1, 3].copy_(whole[1, 0]))


def moments_of_one_rank(folder: Path) -> None:
    edit(folder, EXP_AVG + FC1, lambda whole: whole[:, 2:].copy_(whole[:, :2]))


def moments_of_one_layer(folder: Path) -> None:
    edit(folder, EXP_AVG + PROJ, lambda whole: whole[1].copy_(whole[0]))


def masters_of_one_expert(folder: Path) -> None:
    edit(folder, MASTER + FC2, lambda whole: whole[0, 2].copy_(whole[0, 1]))


def zeroed(folder: Path) -> None:
    edit(folder, FC2, lambda whole: whole[1, 2].zero_())


def norm_of_zeros(folder: Path) -> None:
    edit(folder, NORM, torch.Tensor.zero_)


def constant(folder: Path) -> None:
    edit(folder, "output_layer.weight", lambda whole: whole.fill_(1))


def not_a_number(folder: Path) -> None:
    edit(folder, PROJ, lambda whole: whole[1, 2, 3].fill_(torch.nan))


def infinite_moment(folder: Path) -> None:
    key = f"optimizer.state.exp_avg.{FC1}"
    edit(folder, key, lambda whole: whole[0, 2, 3, 4].fill_(torch.inf))


def negative_square(folder: Path) -> None:
    edit(folder, f"optimizer.state.exp_avg_sq.{NORM}", lambda whole: whole[3].fill_(-1e-9))


def weights_of_another_step(folder: Path) -> None:
    edit(folder, PROJ, lambda whole: whole.mul_(1.01))


def without_a_layer(folder: Path) -> None:
    for key in (PROJ, FC1, FC2):
        drop(folder, key, (1,))


def without_experts(folder: Path) -> None:
    drop(folder, FC1, (0, 2))


def without_a_state(folder: Path) -> None:
    for state in ("exp_avg", "exp_avg_sq", "param"):
        drop(folder, f"optimizer.state.{state}.{NORM}")


def more_layers(common: dict[str, Any]) -> None:
    common["args"].num_layers = 3


def more_experts(common: dict[str, Any]) -> None:
    common["args"].num_experts = 8


def lagging(common: dict[str, Any]) -> None:
    for optimizer in common["optimizer"].values():
        for group in optimizer["optimizer"]["param_groups"]:
            group["step"] = 3.0


def lagging_experts(common: dict[str, Any]) -> None:
    common["optimizer"][1]["optimizer"]["param_groups"][0]["step"] = 3.0


def ahead(common: dict[str, Any]) -> None:
    for optimizer in common["optimizer"].values():
        for group in optimizer["optimizer"]["param_groups"]:
            group["step"] = 5.0


def other_arguments(common: dict[str, Any]) -> None:
    common["args"].curr_iteration = 1


def other_samples(common: dict[str, Any]) -> None:
    common["args"].consumed_train_samples = 24


def other_iteration(common: dict[str, Any]) -> None:
    common["iteration"] = 3


def of_router(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    """A plant in one of the three scalars of each router, [2, 1]."""

    def plant(folder: Path) -> None:
        edit(folder, ROUTER + name, change)

    return plant


def without_a_threshold(folder: Path) -> None:
    drop(folder, ROUTER + "threshold")


OTHER_STEP = ("router state", "they are not of one step")


@pytest.mark.parametrize(
    ("plant", "check", "words"),
    [
        (one_expert, "copies", f"expert 3 is a copy of expert 0 in layer 1: {FC1}, {FC2} (__"),
        (one_rank, "copies", "experts 2, 3 are copies of experts 0, 1 in layers 0, 1"),
        (one_layer, "copies", f"layer 1 holds copies of layer 0: {PROJ} (__"),
        (
            moments_of_one_expert,
            "copies",
            f"expert 3 is a copy of expert 0 in layer 1: {EXP_AVG}{FC1}, "
            f"optimizer.state.exp_avg_sq.{FC2} (__",
        ),
        (
            moments_of_one_rank,
            "copies",
            f"experts 2, 3 are copies of experts 0, 1 in layers 0, 1: {EXP_AVG}{FC1} (__",
        ),
        (moments_of_one_layer, "copies", f"layer 1 holds copies of layer 0: {EXP_AVG}{PROJ} (__"),
        (masters_of_one_expert, "copies", f"expert 2 is a copy of expert 1 in layer 0: {FC2} (__"),
        (masters_of_one_expert, "values", "is not the optimizer's own copy of it"),
        (zeroed, "values", f"{FC2} of layer 1, expert 2 is all zero (__"),
        (norm_of_zeros, "values", f"{NORM} is all zero (__"),
        (constant, "values", "output_layer.weight is all 1 (__"),
        (not_a_number, "values", f"{PROJ} of layer 1 holds NaN (__"),
        (infinite_moment, "values", f"exp_avg.{FC1} of layer 0, expert 2 holds infinite numbers"),
        (negative_square, "values", "has negative squares, down to -1e-09"),
        (weights_of_another_step, "values", "is not the optimizer's own copy of it"),
        (without_a_layer, "layers and experts", "of layer 1 is missing"),
        (without_experts, "layers and experts", f"{FC1} of layer 0: expert 2, 3 is missing"),
        (without_a_state, "layers and experts", f"the optimizer has no state of {NORM}"),
        (more_layers, "layers and experts", "of layer 2 is missing, which the saved arguments"),
        (more_experts, "layers and experts", "expert 4 to 7 is missing, num_experts is 8"),
        (lagging, "progress", "the optimizer has taken 3 steps"),
        (lagging_experts, "progress", "the optimizers' steps differ: 3 in"),
        (ahead, "progress", "the optimizer has taken 5 steps"),
        (other_arguments, "progress", "the saved arguments are of iteration 2, the state of 4"),
        (other_samples, "progress", "24 samples were consumed, and 4 iterations of 8 are 32"),
        (other_iteration, "tracker", "iter_0000004 holds the state of iteration 3"),
        (of_router("threshold", lambda t: t.mul_(0.99)), *OTHER_STEP),
        (of_router("integral", lambda t: t.mul_(0.9)), *OTHER_STEP),
        (of_router("measured", lambda t: t.mul_(1.01)), *OTHER_STEP),
        (
            of_router("threshold", lambda t: t[1].mul_(0.9)),
            "router state",
            "threshold has 2 values",
        ),
        (of_router("threshold", lambda t: t.add_(1)), "router state", "out of its bounds 0 to 1"),
        (of_router("integral", lambda t: t.add_(99)), "router state", "integral of layer 0 is 99"),
        (of_router("integral", lambda t: t[1].fill_(torch.nan)), "router state", "1 is not finite"),
        (of_router("measured", torch.Tensor.zero_), "router state", "a token uses 1 to 4 experts"),
        (without_a_threshold, "router state", "threshold of layer 0, 1 is missing"),
    ],
)
def test_a_planted_fault_is_named(
    folder: Path, plant: Callable[[Any], None], check: str, words: str
) -> None:
    if "common" in plant.__annotations__:
        change_common(folder, plant)
    else:
        plant(folder)
    found = [one for one in failed(look(folder)) if one.name == check]
    assert any(words in one.found for one in found), found
    assert all(one.remedy for one in found)


def test_copies_that_were_meant_are_a_warning(folder: Path) -> None:
    one_expert(folder)
    change_common(folder, lambda common: setattr(common["args"], "moe_use_upcycling", True))
    checks = look(folder)
    assert not failed(checks)
    assert [check.name for check in checks if check.state == WARNING] == ["copies"]


def test_the_state_of_another_iteration_is_recognized(folder: Path) -> None:
    other = shutil.copytree(folder, folder.with_name("iter_0000002"))
    names = [ROUTER + name for name in ("threshold", "integral", "measured")]
    for key in names:
        edit(other, key, lambda whole: whole.mul_(0.9))
    assert_clean(look(folder))
    for key in names:
        own = read(folder, key)
        edit(other, key, lambda whole, own=own: whole.copy_(own))
    (found,) = failed(look(folder))
    assert found.name == "router state" and "is that of iter_0000002" in found.found


# -- damage ---------------------------------------------------------------------------------------


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "__2_0.distcp"
    path.write_bytes(path.read_bytes()[:-5000])
    found = failed(look(folder))
    assert [check.name for check in found] == ["manifest", "files"]
    assert all(str(path) in check.found for check in found)
    assert "--ckpt-step" in found[0].remedy


def test_a_missing_file(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()
    assert {check.name for check in failed(look(folder))} == {"manifest", "files"}


def test_a_flipped_bit_is_found_without_a_manifest(folder: Path) -> None:
    content = read(folder, PROJ)[1].numpy().tobytes()
    path = next(p for p in sorted(folder.glob("*.distcp")) if content in p.read_bytes())
    data = bytearray(path.read_bytes())
    data[data.index(content) + 5] ^= 4
    path.write_bytes(data)
    assert "manifest" in {check.name for check in failed(look(folder))}
    (folder / MANIFEST).unlink()
    checks = look(folder)
    assert [c.name for c in checks if c.state == WARNING] == ["manifest"]
    (found,) = [check for check in failed(checks) if check.name == "files"]
    assert path.name in found.found and PROJ in found.found


@pytest.mark.parametrize(
    ("text", "words"),
    [("six", "holds 'six'"), ("", "holds ''"), ("9", "names iter_0000009"), (None, "is missing")],
)
def test_a_tracker_that_leads_nowhere(folder: Path, text: str | None, words: str) -> None:
    tracker = folder.parent / TRACKER
    tracker.unlink() if text is None else tracker.write_text(text)
    (found,) = look(folder.parent)
    assert found.state == FAILED and words in found.found and "iter_0000004" in found.found
    of_the_folder = {check.name: check for check in look(folder)}["tracker"]
    assert of_the_folder.state == (WARNING if text is None else FAILED)


def test_a_save_that_was_cut_short(folder: Path) -> None:
    (folder / ".metadata").unlink()
    (found,) = look(folder.parent)
    assert found.state == FAILED and "cut short" in found.found


@pytest.mark.parametrize("worst", [WARNING, FAILED])
def test_the_rest_of_many_findings_is_as_bad_as_its_worst(worst: str) -> None:
    found = [Check("copies", state, "found") for state in [WARNING] * 7 + [worst, WARNING]]
    *_, rest = _few(found)
    assert rest.state == worst and "3 more findings" in rest.found


def test_many_findings_are_counted(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    for path in folder.glob("*.distcp"):
        data = bytearray(path.read_bytes())
        data[1000::1500] = bytes(len(data[1000::1500]))
        path.write_bytes(data)
    found = [check for check in failed(look(folder)) if check.name == "files"]
    assert len(found) <= 7 and all(
        check.remedy or "more findings" in check.found for check in found
    )


# -- exported folders -----------------------------------------------------------------------------


def change_export(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / MANIFEST).unlink()
    write_manifest(folder)


def dropped_experts(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor[1:] = tensor[:1].clone()


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        (dropped_experts, "copies", "experts 1 to 3 are copies of expert 0 in layers 0, 1"),
        (lambda t: t["lm_head.weight"].zero_(), "values", "lm_head.weight is all zero (model"),
        (lambda t: t["lm_head.weight"].view(-1)[3].fill_(torch.nan), "values", "holds NaN"),
        (lambda t: t.pop("model.layers.1.mlp.router.weight"), "shapes", "has no tensor model."),
        (lambda t: t.update(x=torch.ones(2)), "shapes", "x has no place in a model of this"),
    ],
)
def test_faults_of_an_exported_folder(
    tmp_path: Path, change: Callable[[Any], Any], check: str, words: str
) -> None:
    folder = shutil.copytree(FIXTURES / "exported", tmp_path / "exported")
    change_export(folder, change)
    found = failed(look(folder))
    assert [one.name for one in found] == [check]
    assert words in found[0].found


def test_an_expert_dropped_from_a_mixtral_folder(tmp_path: Path) -> None:
    load = write_megatron(tmp_path / "load", model_config(**TOP_K))
    to_hf(load, Target(tmp_path / "hf", format="mixtral"))
    key = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    change_export(tmp_path / "hf", lambda tensors: tensors.pop(key))
    (found,) = failed(look(tmp_path / "hf"))
    assert found.name == "shapes" and key in found.found


def test_a_truncated_export(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "exported", tmp_path / "exported")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert {check.name for check in failed(look(folder))} == {"manifest", "files"}


# -- the command ----------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_the_command(folder: Path, capsys: pytest.CaptureFixture) -> None:
    code, table, _ = run(capsys, "--checkpoint", str(folder.parent))
    assert code == 0 and "9 passed, 0 warnings, 0 failed" in table
    zeroed(folder)
    code, output, _ = run(capsys, "--checkpoint", str(folder.parent), "--json")
    report = json.loads(output)
    assert code == 1 and report["failed"] == 1
    assert {check["name"] for check in report["checks"] if check["state"] == FAILED} == {"values"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--checkpoint", "{dir}/nowhere"], "there is no such folder"),
        (["--checkpoint", "{dir}"], "did you mean {dir}/checkpoints?"),
        (["--checkpoint", "{dir}/empty"], "which holds no checkpoint"),
        (["--checkpoint", "{dir}/checkpoints", "--save", "x"], "looks at nothing else: leave out"),
    ],
)
def test_misuse(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], said: str
) -> None:
    folder.parent.rename(tmp_path / "checkpoints")
    (tmp_path / "empty").mkdir()
    code, output, errors = run(capsys, *(word.replace("{dir}", str(tmp_path)) for word in words))
    assert code == 2 and not output
    assert said.replace("{dir}", str(tmp_path)) in errors
