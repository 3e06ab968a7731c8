"""Upstream's HybridModel with our layers: the same training as a GPTModel, resumed, and in layouts.

A layer of the GPTModel is two of the pattern, attention and MLP, and both models draw the same
first weights.
"""

from __future__ import annotations

import re

import pytest
import torch

from megatron_dynmoe.data.finding import PASSED
from megatron_dynmoe.doctor.checkpoint.look import look
from tests.distributed.agreement import tensors
from tests.distributed.harness import DTOP_P, TINY, Case, CaseResult, Results, add
from tests.distributed.selection import matrix
from tests.distributed.test_conversion import from_hf, to_hf
from tests.distributed.test_resume import checkpoint, differences, is_model

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

HALF, STEPS = 3, 6
# Each layer has a threshold of its own, so that a wrong number of a layer shows.
COMMON = (
    f"{TINY.replace('--num-layers 4 ', '')} {DTOP_P} --moe-dynamic-scope layer --split 1,0,0 "
    f"--train-iters {STEPS} --save-interval {HALF} "
    "--make-vocab-size-divisible-by 16"  # 128, with and without tensor parallelism
)
MODEL = f"{COMMON} --hybrid-layer-pattern *E*-*E"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
CP2 = "--context-parallel-size 2 --cp-comm-type a2a"
STAGES = f"{COMMON} --hybrid-layer-pattern *E|*-*E --pipeline-model-parallel-size 2"


def case(name: str, flags: str, num_ranks: int = 1, after: tuple[Case, ...] = ()) -> Case:
    return add(Case(name, num_ranks, f"{flags} --save {{dir}}/{name}", after=after))


GPT = case("hybrid_as_gpt", f"{COMMON} --num-layers 3 --moe-layer-freq [1,0,1]")
WHOLE = case("hybrid", MODEL)
LOAD = f"--load {{dir}}/{WHOLE.name} --ckpt-step {HALF}"
RESUMED = case("hybrid_resumed", f"{MODEL} {LOAD}", after=(WHOLE,))
LAYOUTS = {
    "ep2": case("hybrid_ep2", f"{MODEL} {LOAD} --expert-model-parallel-size 2", 2, after=(WHOLE,)),
    "pp2": case("hybrid_pp2", f"{STAGES} {LOAD}", 2, after=(WHOLE,)),
    "tp2": case("hybrid_tp2", f"{MODEL} {LOAD} {TP2}", 2, after=(WHOLE,)),
    "cp2": case("hybrid_cp2", f"{MODEL} {LOAD} {CP2}", 2, after=(WHOLE,)),
}
# To a Hugging Face folder, and back as either model.
EXPORTED = to_hf(WHOLE, "hybrid_hf", "")
BACK = from_hf(EXPORTED, "hybrid_back", "--hybrid")
BACK_AS_GPT = from_hf(EXPORTED, "hybrid_back_as_gpt")
FRESH = "--finetune --no-load-optim --no-load-rng"


def went_on(origin: Case, flags: str) -> Case:
    return add(
        Case(
            f"{origin.name}_on", 1, f"{flags} {FRESH} --load {{dir}}/{origin.name}", after=(origin,)
        )
    )


ON, BACK_ON = (went_on(origin, MODEL) for origin in (WHOLE, BACK))
BACK_AS_GPT_ON = went_on(BACK_AS_GPT, f"{COMMON} --num-layers 3 --moe-layer-freq [1,0,1]")
OTHER_LAYERS = add(
    Case(
        "hybrid_loaded_as_gpt",
        1,
        f"{COMMON} --num-layers 6 --load {{dir}}/{WHOLE.name}",
        after=(WHOLE,),
    )
)


def test_it_trains_as_the_same_model_written_as_gpt(results: Results) -> None:
    gpt, hybrid = results[GPT], results[WHOLE]
    assert hybrid.losses == pytest.approx(gpt.losses, rel=1e-6)
    assert hybrid.losses[-1] < hybrid.losses[0]
    for name in ("threshold", "integral", "measured", "theta"):
        expected = [{2 * layer: x for layer, x in step.items()} for step in gpt.by_layer(name)]
        for step, wanted in zip(hybrid.by_layer(name), expected, strict=True):
            assert step == pytest.approx(wanted, rel=1e-5), name
    assert len({*hybrid.by_layer("threshold")[-1].values()}) == 2
    # Weights and the optimizer's moments
    expected, actual = ({**weights(result)} for result in (gpt, hybrid))
    expected = {as_hybrid(name): tensor for name, tensor in expected.items()}
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def weights(result: CaseResult) -> dict[str, torch.Tensor]:
    found = tensors(result.directory / result.case.name / f"iter_{STEPS:07d}")
    return {name: tensor for name, tensor in found.items() if "decoder" in name}


def as_hybrid(name: str) -> str:
    """The name that a tensor of a GPTModel has in the HybridModel of twice as many layers."""

    def renumbered(found: re.Match[str]) -> str:
        return f"layers.{2 * int(found[1]) + (found[2] == 'mlp')}.{found[2]}."

    name = re.sub(r"layers\.(\d+)\.(\w+)\.", renumbered, name)
    return name.replace("final_layernorm", "final_norm")


def test_resume_equals_one_go_bitwise(results: Results) -> None:
    whole, resumed = results[WHOLE], results[RESUMED]
    assert resumed.losses == whole.losses[HALF:]
    assert differences(checkpoint(whole), checkpoint(resumed)) == {}


@pytest.mark.parametrize("layout", matrix(LAYOUTS, ("ep2", "pp2")))
def test_another_layout_goes_on_as_one_rank(results: Results, layout: str) -> None:
    whole, resumed = results[WHOLE], results[LAYOUTS[layout]]
    assert resumed.losses == pytest.approx(whole.losses[HALF:], rel=1e-5)
    assert differences(checkpoint(whole), checkpoint(resumed), 1e-5) == {}


def test_another_model_cannot_load_it(results: Results) -> None:
    message = (results.any(OTHER_LAYERS).error or "it was accepted").strip().splitlines()[-1]
    said = r"--hybrid-layer-pattern is not given, and the model in .* was trained with \*E\*-\*E"
    assert re.search(said, message), message


def test_the_doctor_knows_its_layers(results: Results) -> None:
    whole = results[WHOLE]
    checks = look(whole.directory / whole.case.name)
    assert [check for check in checks if check.state != PASSED] == []
    said = {check.name: check.found for check in checks}
    assert "6 layers, 2 of them with 8 experts" in said["layers and experts"]


def test_it_is_exported_and_comes_back_to_the_bit(results: Results) -> None:
    results.any(BACK)
    folder = results[WHOLE].directory
    before = tensors(folder / WHOLE.name / f"iter_{STEPS:07d}")
    after = tensors(folder / BACK.name / "release")
    aliases = {name for name in after if "pre_mlp_layernorm" in name or "input_layernorm" in name}
    assert (
        differences(
            {name: tensor for name, tensor in before.items() if is_model(name)},
            {name: tensor for name, tensor in after.items() if name not in aliases},
        )
        == {}
    )


@pytest.mark.parametrize(("back", "rel"), [(BACK_ON, 0), (BACK_AS_GPT_ON, 1e-6)])
def test_it_comes_back_as_either_model(results: Results, back: Case, rel: float) -> None:
    on, back_on = results[ON], results[back]
    assert back_on.losses == pytest.approx(on.losses, rel=rel, abs=0)
    assert on.losses[-1] < results[WHOLE].losses[0] - 0.01
