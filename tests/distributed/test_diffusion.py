"""``examples/diffusion`` on digits, through Megatron's loop in real processes."""

import contextlib
import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from PIL import Image

from tests.distributed.agreement import GRADIENTS, assert_same_gradients, assert_same_training
from tests.distributed.harness import DTOP_P, Case, CaseResult, Results, add
from tests.distributed.selection import matrix
from tests.distributed.test_resume import checkpoint, differences

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.megatron,
    pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn has the digits"),
]

HALF, STEPS = 20, 40
MODEL = (
    f"--images digits {DTOP_P} --num-layers 2 --hidden-size 32 --ffn-hidden-size 32 "
    "--num-attention-heads 2 --num-experts 8 --normalization RMSNorm --swiglu "
    "--disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --micro-batch-size 16 "
    "--global-batch-size 32 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 0 "
    f"--train-iters {STEPS} --log-interval 1 --eval-iters 0 --eval-interval 1000 --num-workers 0 "
    "--distributed-timeout-minutes 5"
)


def run(name: str, num_ranks: int, flags: str = "", **fields: Any) -> Case:
    flags = f"{MODEL} {flags}"
    entry = "examples.diffusion.train:main"
    return add(Case(f"diffusion_{name}", num_ranks, flags, entry=entry, **fields))


@contextlib.contextmanager
def causality(recorder: Any) -> Iterator[None]:
    """After the run: does the first patch's velocity depend on the last patch?"""
    yield
    from megatron.core.utils import unwrap_model

    dit = unwrap_model(recorder.model[0])
    x = torch.zeros(1, 1, 8, 8)
    other = x.clone()
    other[..., 6:, 6:] = 1
    with torch.no_grad():
        outputs = [dit(each, torch.tensor([0.5]), torch.tensor([3])) for each in (x, other)]
    recorder.result["last_patch_changes_first"] = (
        (outputs[0] - outputs[1])[..., :2, :2].abs().max().item()
    )


WHOLE = run(
    "whole",
    1,
    f"--save {{dir}}/diffusion_whole --save-interval {HALF}",
    hooks=(*GRADIENTS, f"{__name__}:causality"),
)
RESUMED = run(
    "resumed",
    1,
    f"--load {{dir}}/diffusion_whole --ckpt-step {HALF} --save {{dir}}/diffusion_resumed "
    f"--save-interval {HALF}",
    after=(WHOLE,),
)
SHORT = f"--train-iters 4 --lr-decay-iters {STEPS}"
DP2 = run("dp2", 2, SHORT, hooks=GRADIENTS)
# Weights that every layout can load.
LOAD = f"--load {{dir}}/diffusion_whole --ckpt-step {HALF} --finetune --no-load-optim --no-load-rng"
KEPT = "--run-dir {dir}/diffusion_run_"
LOADED = run("loaded", 1, f"{LOAD} {SHORT} {KEPT}one", hooks=GRADIENTS, after=(WHOLE,))
LAYOUTS = {
    "ep2": "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
    "pp2": "--pipeline-model-parallel-size 2",
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
}
SAME_WEIGHTS = {
    name: run(
        f"loaded_{name}", 2, f"{LOAD} {SHORT} {flags} {KEPT}{name}", hooks=GRADIENTS, after=(WHOLE,)
    )
    for name, flags in LAYOUTS.items()
}


@contextlib.contextmanager
def quick_classifier(_recorder: Any) -> Iterator[None]:
    """It needs not know much here."""
    from examples.diffusion import measure

    measure.CLASSIFIER_STEPS = 30
    yield


def measuring(name: str, case: Case) -> Case:
    """One process loads what any number have trained."""
    return add(
        Case(
            f"diffusion_measured_{name}",
            1,
            f"{{dir}}/diffusion_run_{name} --samples 10 --sampling-steps 2",
            entry="examples.diffusion.measure:main",
            hooks=(f"{__name__}:quick_classifier",),
            after=(case,),
        )
    )


MEASURED_ONE = measuring("one", LOADED)
MEASURED = {name: measuring(name, case) for name, case in SAME_WEIGHTS.items()}
DRAWN = run(
    "drawn",
    2,
    f"{LAYOUTS['ep2']} --load {{dir}}/diffusion_whole --skip-train --eval-iters 1 "
    "--run-dir {dir}/diffusion_drawn --samples-per-class 2 --sampling-steps 2",
    after=(WHOLE,),
)
REFUSED = {
    "--patch-size 3": "--patch-size is 3, and the images are 8 x 8 pixels: give a number that "
    "divides both",
    "--images /nowhere": "--images is /nowhere: [Errno 2] No such file or directory: '/nowhere'",
    "--held-out 2": "--held-out is 2.0: give a number from 0 to 0.9",
    "--hybrid-layer-pattern *E*E": "--hybrid-layer-pattern is *E*E, and this model is made of "
    "whole layers: use --num-layers",
    "--position-embedding-type rope": "--position-embedding-type is rope, and patches have "
    "positions in 2-D: leave it out",
    "--eod-mask-loss": "--eod-mask-loss is given, and an image is one sequence: leave it out",
}
REFUSALS = {flags: run(f"refused_{n}", 1, flags) for n, flags in enumerate(REFUSED)}


def test_the_loss_falls_and_the_target_is_held(results: Results) -> None:
    whole = results[WHOLE]
    last = sum(whole.losses[-5:]) / 5
    assert last < 0.8 * whole.losses[0]
    assert sum(whole.experts_per_token[-10:]) / 10 == pytest.approx(2, rel=0.05)
    assert max(whole.finalized[0]["tokens"]) == 32 * (2 + 16)
    assert "Hugging Face" not in whole.log()  # no note of what stands in an export's way


def test_attention_is_bidirectional(results: Results) -> None:
    assert results[WHOLE].ranks[0]["last_patch_changes_first"] > 0


def test_resume_equals_one_go_bitwise(results: Results) -> None:
    whole, resumed = results[WHOLE], results[RESUMED]
    assert resumed.losses == whole.losses[HALF:]
    assert differences(checkpoint(whole, STEPS), checkpoint(resumed, STEPS)) == {}


def test_the_average_follows_the_weights(results: Results) -> None:
    """The checkpoint's average moves as its recursion says: between those of two steps."""
    half, end = (checkpoint(results[WHOLE], step) for step in (HALF, STEPS))
    names = [name for name in end if f"average.{name}" in end and end[name].is_floating_point()]
    assert any("experts" in name for name in names) and "patch_out.weight" in names
    weight, average = end["patch_out.weight"], end["average.patch_out.weight"]
    assert not torch.equal(weight, average)
    assert (weight - average).norm() < (weight - half["average.patch_out.weight"]).norm()
    router = "decoder.layers.mlp.router.threshold"
    assert not torch.equal(end[f"average.{router}"], half[f"average.{router}"])


def test_two_data_parallel_ranks_equal_one(results: Results) -> None:
    whole, dp2 = results[WHOLE], results[DP2]
    assert dp2.losses[0] == pytest.approx(whole.losses[0], rel=1e-6)
    assert dp2.losses == pytest.approx(whole.losses[:4], rel=1e-4)
    assert dp2.assignments[0] == whole.assignments[0]
    assert_same_gradients(whole, dp2)


@pytest.mark.parametrize("name", matrix(LAYOUTS, ("ep2",)))
def test_other_layouts_train_alike(results: Results, name: str) -> None:
    one, many = results[LOADED], results[SAME_WEIGHTS[name]]
    assert_same_training(one, many)
    assert_same_gradients(one, many)


def test_an_evaluation_draws_samples_and_counts_experts(results: Results) -> None:
    folder = results[DRAWN].directory / "diffusion_drawn" / "samples"
    with Image.open(folder / f"step_{STEPS}.png") as image:
        assert image.size == (3 * 2 * (8 + 2), 3 * 10 * (8 + 2))  # 2 columns of 10 classes
        assert len(image.getcolors()) > 10
    assert (folder / f"experts_{STEPS}.png").stat().st_size > 0
    counted = json.loads((folder / f"experts_{STEPS}.json").read_text())
    assert len(counted["times"]) == len(counted["loss"]) == len(counted["experts"]) == 10
    assert counted["layers"] == [1, 2]
    assert {len(tokens) for level in counted["experts"] for tokens in level} == {2 + 16}
    assert all(math.isfinite(loss) and loss > 0 for loss in counted["loss"])
    mean = torch.tensor(counted["experts"]).mean().item()
    assert mean == pytest.approx(2, rel=0.3)
    of_steps = torch.tensor(counted["sampling"])
    assert of_steps.shape == (2, 2, 2 + 16)  # steps, layers, tokens
    assert of_steps.min() >= 1 and of_steps.mean().item() == pytest.approx(2, rel=0.3)


def measured(result: CaseResult, name: str) -> dict[str, Any]:
    folder = result.directory / f"diffusion_run_{name}"
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "samples" / "step_4.png").is_file()
    return json.loads((folder / "samples" / "measured_4.json").read_text())


@pytest.mark.parametrize("name", matrix(LAYOUTS, ("pp2", "tp2")))
def test_a_run_is_measured_in_one_process_whatever_its_layout(results: Results, name: str) -> None:
    one = measured(results[MEASURED_ONE], "one")
    many = measured(results[MEASURED[name]], name)
    assert one["samples"] == many["samples"] == 100
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert many["frechet"] == pytest.approx(one["frechet"], rel=1e-2)
    assert one["frechet"] > one["frechet_of_held_out"] > 0


@pytest.mark.parametrize("flags", REFUSED)
def test_what_makes_no_sense_is_one_line(results: Results, flags: str) -> None:
    message = (results.any(REFUSALS[flags]).error or "it was accepted").strip().splitlines()[-1]
    assert message.startswith(f"UsageError: {REFUSED[flags]}"), message
