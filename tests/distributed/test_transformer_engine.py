"""Transformer Engine through Megatron's loop: trainings as on torch_native, and checkpoints.

Without a GPU its double runs (tests/doubles); ``make test-te`` asks the original. Whether it is
installed is settled when Megatron is imported. So three sessions follow each other: that of all
modules, without it, which saves what trainings begin with; one with it; and, among the long tests,
one without it that goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.agreement import GRADIENTS, assert_same_gradients, assert_same_training
from tests.distributed.agreement import tensors as tensors_of
from tests.distributed.faults import replaced
from tests.distributed.harness import DTOP_P, TINY, Case, CaseResult, Results, add, run_session
from tests.distributed.test_latent_attention import SIZES as LATENT
from tests.doubles.on_cpu import has_the_original, possible, run_with_transformer_engine

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

CASES = "tests.distributed.conversion_cases"
NATIVE, TE = "--moe-dynamic-backend torch_native", "--moe-dynamic-backend transformer_engine"
ALLTOALL = "--moe-token-dispatcher-type alltoall"
EP2 = "--expert-model-parallel-size 2"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
FLAGS = {  # what a training on Transformer Engine is named after
    "allgather": "--moe-token-dispatcher-type allgather",
    "grouped": "--moe-grouped-gemm",
    "fused": "--moe-permute-fusion",
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "ep2": EP2,
    "pp2": "--pipeline-model-parallel-size 2",
    "whole": "--expert-tensor-parallel-size 1",
    "overlap": "--moe-shared-expert-overlap",
    "all": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "moe": f"{SELECTIVE} moe",
    "norms": f"{SELECTIVE} layernorm",
    "activations": f"{SELECTIVE} moe_act --moe-grouped-gemm",
    "native": NATIVE,
    "cp2": "--context-parallel-size 2",  # p2p is upstream's default
    "cp4": "--context-parallel-size 4",
    "gathered": "--cp-comm-type all_gather",
    "heads": "--cp-comm-type a2a",
}
RESHARDABLE = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
# Tensor parallelism pads the vocabulary to a multiple of this times its ranks.
MODEL = f"{TINY} --num-layers 2 --make-vocab-size-divisible-by 16"
MODELS = {
    "dtop_p": f"{MODEL} {DTOP_P}",
    "shared": f"{MODEL} --moe-dynamic-routing top_p --moe-dynamic-threshold 0.3 --qk-layernorm "
    "--group-query-attention --num-query-groups 2 --moe-shared-expert-intermediate-size 32",
    # Fused, its rotary positions are a Triton kernel of Megatron.
    "latent": f"{MODEL} {DTOP_P} {LATENT} --no-rope-fusion",
}
UNCHANGED = "--lr 0 --min-lr 0 --weight-decay 0 --train-iters 1"
HALF, STEPS = 2, 4

BEFORE: list[Case] = []
WITH_TE: list[Case] = []
LONG: list[Case] = []
AFTER: list[Case] = []


def case(session: list[Case], name: str, num_ranks: int, flags: str, **fields: Any) -> Case:
    one = Case(f"te_{name}" if session is BEFORE else name, num_ranks, flags, **fields)
    session.append(one if session is not BEFORE or has_the_original() else add(one))
    return one


def loading(folder: str) -> str:
    return f"--load {folder} --exit-on-missing-checkpoint"


def fresh(folder: str) -> str:
    return f"{loading(folder)} --finetune --no-load-optim --no-load-rng"


# --- trainings from the same weights ---

WEIGHTS = {
    model: case(
        BEFORE,
        f"weights_{model}",
        1,
        f"{flags} {ALLTOALL} {NATIVE} --train-iters 1 --save {{dir}}/te_weights_{model} "
        "--save-interval 1",
    )
    for model, flags in MODELS.items()
}
ON_NATIVE = {
    model: case(
        BEFORE,
        f"native_{model}",
        1,
        f"{flags} {ALLTOALL} {NATIVE} {FLAGS['grouped']} {fresh('{dir}/te_weights_' + model)}",
        hooks=GRADIENTS,
        after=(WEIGHTS[model],),
    )
    for model, flags in MODELS.items()
}


FLOAT32 = (f"{__name__}:splits_float32",)


@contextlib.contextmanager
def splits_float32(recorder: Any) -> Iterator[None]:
    """The attention of the double splits float32, which that of the original does not."""
    from transformer_engine.pytorch.attention import context_parallel

    from megatron_dynmoe.backends import transformer_engine

    with (
        replaced(context_parallel, "SPLITS_FLOAT32", True),
        replaced(transformer_engine, "check_context_parallel", lambda transformer: None),
    ):
        yield


def on_te(session: list[Case], model: str, words: str = "", num_ranks: int = 1) -> Case:
    splits = FLOAT32 if "cp" in words else ()
    flags = " ".join((MODELS[model], ALLTOALL, TE, *(FLAGS[word] for word in words.split())))
    flags += f" {fresh('{before}/te_weights_' + model)}"
    name = "_".join((model, *words.split()))
    return case(session, name, num_ranks, flags, hooks=(*splits, *GRADIENTS))


TRAINED = [
    on_te(WITH_TE, "dtop_p"),
    on_te(WITH_TE, "dtop_p", "grouped"),
    on_te(WITH_TE, "dtop_p", "fused"),
    on_te(WITH_TE, "dtop_p", "fused ep2", 2),
    on_te(WITH_TE, "dtop_p", "pp2", 2),
    on_te(WITH_TE, "shared", "fused tp2", 2),
    on_te(WITH_TE, "shared", "ep2", 2),
    on_te(WITH_TE, "shared", "cp2 ep2", 2),
    on_te(WITH_TE, "latent", "cp2 fused", 2),
]
UNGROUPED, GROUPED, *_ = TRAINED
TRAINED_LONG = [
    *(
        on_te(LONG, model, f"{dispatch} {layout}", num_ranks)
        for model in ("dtop_p", "shared")
        for dispatch in ("", "allgather", "fused")
        for num_ranks, layout in (
            (2, "tp2"),
            (4, "ep2"),
            (4, "ep2 tp2"),
            (4, "ep2 tp2 whole"),
            (4, "ep2 pp2"),
        )
    ),
    *(
        on_te(LONG, model, f"ep2 {recompute}", 2)
        for model in ("dtop_p", "shared")
        for recompute in ("all", "moe", "norms", "activations")
    ),
    on_te(LONG, "shared", "ep2 overlap", 2),
    on_te(LONG, "dtop_p", "allgather fused tp2", 2),
    on_te(LONG, "dtop_p", "fused ep2 native", 2),
    *(
        on_te(LONG, model, layout, num_ranks)
        for model in MODELS
        for num_ranks, layout in (
            (2, "cp2 heads"),
            (2, "cp2 gathered"),
            (4, "cp4 ep2"),
            (4, "cp2 tp2 ep2"),
            (4, "cp2 pp2"),
            (4, "cp2 ep2"),
        )
        if (model, layout) != ("shared", "cp2 ep2")
    ),
    *(on_te(LONG, "latent", layout, 2) for layout in ("ep2", "tp2", "pp2", "all")),
]

# Experts with biases, which torch_native leaves to upstream's local ones.
BIASED = f"{MODELS['dtop_p']} {ALLTOALL}".replace(
    "--disable-bias-linear", "--no-bias-dropout-fusion"
)
BIASED_WEIGHTS = case(
    LONG,
    "biased_weights",
    2,
    f"{BIASED} {EP2} --transformer-impl local --train-iters 1 --save {{dir}}/biased "
    "--save-interval 1",
)
ON_LOCAL, *BIASED_ON_TE = (
    case(LONG, name, 2, f"{BIASED} {flags} {fresh('{dir}/biased')}", after=(BIASED_WEIGHTS,))
    for name, flags in (
        ("biased_local", f"{EP2} --transformer-impl local"),
        ("biased_ep2", f"{EP2} {TE}"),
        ("biased_tp2", f"{FLAGS['tp2']} {EP2} {FLAGS['whole']} {TE}"),  # upstream refuses others
    )
)

# --- checkpoints: two steps more from the half, under either back end ---

LAYOUTS = {"one": (1, ""), "ep2": (2, f"{EP2} {RESHARDABLE}")}


def takes_steps(session: list[Case], name: str, backend: str, layout: str, **fields: Any) -> Case:
    num_ranks, flags = LAYOUTS[layout]
    flags = f"{MODELS['dtop_p']} {ALLTOALL} {backend} {flags} --train-iters {STEPS}"
    return case(session, f"{name}_{layout}", num_ranks, f"{flags} {fields.pop('more')}", **fields)


def saves(session: list[Case], name: str, backend: str) -> dict[str, Case]:
    """By layout."""
    folder = f"te_{name}" if session is BEFORE else name
    more = f"--save-interval {HALF} --save {{dir}}/{folder}_"
    return {
        layout: takes_steps(session, name, backend, layout, more=more + layout)
        for layout in LAYOUTS
    }


def goes_on(
    session: list[Case], name: str, backend: str, layout: str, origin: Case, where: str
) -> tuple[Case, Case]:
    more = f"{loading(f'{{{where}}}/{origin.name}')} --ckpt-step {HALF}"
    after = (origin,) if where == "dir" else ()
    return origin, takes_steps(session, name, backend, layout, more=more, after=after)


SAVED_BY_NATIVE, SAVED_BY_TE = saves(BEFORE, "native", NATIVE), saves(WITH_TE, "saved", TE)
EXCHANGED = {
    f"{name}_{layout}": goes_on(WITH_TE, name, backend, layout, origin[layout], where)
    for name, backend, layout, origin, where in (
        ("te_to_te", TE, "ep2", SAVED_BY_TE, "dir"),
        ("native_to_te", TE, "one", SAVED_BY_NATIVE, "before"),
        ("native_to_te", TE, "ep2", SAVED_BY_NATIVE, "before"),
        ("te_to_native", NATIVE, "ep2", SAVED_BY_TE, "dir"),
    )
}
# Now with PyTorch's Adam.
EXCHANGED_LONG = {
    f"te_to_native_{layout}": goes_on(AFTER, "native", NATIVE, layout, SAVED_BY_TE[layout], "te")
    for layout in LAYOUTS
}


# --- conversion: of a checkpoint, and of the same weights as Transformer Engine saved them ---


def converts(session: list[Case], name: str, flags: str, *origins: Case) -> Case:
    return case(session, name, 1, f"{flags} --quiet", entry=f"{CASES}:convert", after=origins)


def trains_on(session: list[Case], backend: str, where: str) -> Case:
    flags = f"{MODELS['shared']} {ALLTOALL} {backend} {loading('{' + where + '}/te_imported')}"
    return case(session, "from_hf", 1, flags, after=(IMPORTED,) if where == "dir" else ())


EXPORTED = converts(
    BEFORE,
    "hf",
    "to-hf --load {dir}/te_weights_shared --output {dir}/te_hf",
    WEIGHTS["shared"],
)
IMPORTED = converts(
    BEFORE,
    "imported",
    "from-hf --model {dir}/te_hf --save {dir}/te_imported",
    EXPORTED,
)
FROM_HF = trains_on(BEFORE, NATIVE, "dir"), trains_on(WITH_TE, TE, "before")
SAME_WEIGHTS = case(
    WITH_TE,
    "same_weights",
    1,
    f"{MODELS['shared']} {ALLTOALL} {TE} {fresh('{before}/te_weights_shared')} {UNCHANGED} "
    "--save {dir}/same_weights --save-interval 1 --eval-iters 1 --eval-interval 1",
    hooks=(f"{CASES}:computed",),
)
EXPORTED_AGAIN = converts(
    WITH_TE, "hf", "to-hf --load {dir}/same_weights --output {dir}/hf", SAME_WEIGHTS
)


Runs = dict[str, CaseResult]


@pytest.fixture(scope="module")
def before(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    if has_the_original():
        return run_session(possible(BEFORE), tmp_path_factory.mktemp("before_te"))
    return {one.name: results.any(one) for one in BEFORE}


@pytest.fixture(scope="module")
def with_te(before: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cases = placed(WITH_TE, before=before)
    return run_with_transformer_engine(cases, tmp_path_factory.mktemp("with_te"))


@pytest.fixture(scope="module")
def with_te_long(before: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cases = placed(LONG, before=before)
    return run_with_transformer_engine(cases, tmp_path_factory.mktemp("with_te_long"))


@pytest.fixture(scope="module")
def after(with_te: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cases = placed(possible(AFTER), te=with_te)
    return run_session(cases, tmp_path_factory.mktemp("after_te"))


def result(runs: Runs, one: Case) -> CaseResult:
    if one.name not in runs:
        pytest.skip(f"needs {one.num_ranks} GPUs, or is in float32 for the double")
    return runs[one.name].check()


def placed(cases: list[Case], **results: dict[str, CaseResult]) -> list[Case]:
    """With the folders of earlier sessions in place of their names."""
    placed = []
    for one in cases:
        if has_the_original() and set(FLOAT32) & set(one.hooks):
            continue
        flags = one.flags
        for name, result in results.items():
            folder = next(iter(result.values())).directory
            flags = flags.replace(f"{{{name}}}", str(folder))
        placed.append(dataclasses.replace(one, flags=flags))
    return placed


def assert_as_on_native(before: Runs, runs: Runs, trained: Case) -> None:
    model = next(name for name in MODELS if trained.name.startswith(name))
    native, te = result(before, ON_NATIVE[model]), result(runs, trained)
    assert_same_training(native, te)
    assert_same_gradients(native, te)


@pytest.mark.parametrize("trained", TRAINED, ids=lambda one: one.name)
def test_a_training_is_that_of_torch_native(before, with_te, trained: Case) -> None:
    assert_as_on_native(before, with_te, trained)


@pytest.mark.long
@pytest.mark.parametrize("trained", TRAINED_LONG, ids=lambda one: one.name)
def test_more_trainings_are_those_of_torch_native(before, with_te_long, trained: Case) -> None:
    assert_as_on_native(before, with_te_long, trained)


@pytest.mark.long
@pytest.mark.parametrize("trained", BIASED_ON_TE, ids=lambda one: one.name)
def test_biases_are_those_of_upstreams_local_experts(with_te_long, trained: Case) -> None:
    assert_same_training(result(with_te_long, ON_LOCAL), result(with_te_long, trained))


def test_a_flag_for_grouped_experts_changes_nothing(before, with_te) -> None:
    plain, flag = (result(with_te, one) for one in (UNGROUPED, GROUPED))
    assert plain.losses == flag.losses
    described = "> back end: transformer_engine (asked for) | experts: its grouped GEMMs"
    assert described in plain.log(0) and described in flag.log(0)
    if not has_the_original():
        native = result(before, ON_NATIVE["dtop_p"])
        assert "--moe-grouped-gemm needs a GPU and becomes False" in native.log(0)


def assert_goes_on(whole: CaseResult, resumed: CaseResult) -> None:
    assert len(whole.losses) == STEPS
    # The last loss follows from the step before, so from the optimizer's state.
    assert resumed.losses == pytest.approx(whole.losses[HALF:], rel=1e-5)
    assert resumed.thresholds == pytest.approx(whole.thresholds[HALF:], abs=1e-4)


@pytest.mark.parametrize("exchange", EXCHANGED)
def test_a_run_goes_on_from_the_checkpoint_of_either_back_end(before, with_te, exchange) -> None:
    whole, resumed = (result(before | with_te, one) for one in EXCHANGED[exchange])
    assert_goes_on(whole, resumed)
    if "te_to_te" in exchange and not has_the_original():  # a GPU may add in another order
        assert resumed.losses == whole.losses[HALF:]


@pytest.mark.long
@pytest.mark.parametrize("exchange", EXCHANGED_LONG)
def test_a_run_goes_on_without_transformer_engine(with_te, after, exchange) -> None:
    assert_goes_on(*(result(with_te | after, one) for one in EXCHANGED_LONG[exchange]))


def test_names_in_a_checkpoint(with_te, before) -> None:
    """A norm is named after the linear layer that it is fused into, experts as if one by one."""
    te, native = (
        {
            name: tensor.shape
            for name, tensor in tensors_of(folder / f"iter_{HALF:07}").items()
            if name.startswith("decoder.layers")
        }
        for folder in (
            result(with_te, SAVED_BY_TE["one"]).directory / "saved_one",
            result(before, SAVED_BY_NATIVE["one"]).directory / "te_native_one",
        )
    )
    moved = te.pop("decoder.layers.pre_mlp_layernorm.weight")
    assert native.pop("decoder.layers.mlp.linear_fc1.layer_norm_weight") == moved
    assert te == native
    assert {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        "decoder.layers.mlp.router.threshold",
    } <= te.keys()


def test_a_converted_checkpoint_trains_on(before, with_te) -> None:
    native, te = result(before, FROM_HF[0]), result(with_te, FROM_HF[1])
    assert_same_training(native, te)


def test_its_checkpoint_is_converted_to_the_same_folder(before, with_te) -> None:
    folders = (
        result(before, EXPORTED).directory / "te_hf",
        result(with_te, EXPORTED_AGAIN).directory / "hf",
    )
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (json.loads((folder / "config.json").read_text()) for folder in folders)
    del one["measured_experts_per_token"]  # of the step before
    (measured,) = result(with_te, SAME_WEIGHTS).by_layer("measured")
    assert two.pop("measured_experts_per_token") == pytest.approx([*measured.values()])
    assert one == two


def test_the_converted_model_computes_what_it_computed(before, with_te) -> None:
    from transformers import AutoModelForCausalLM

    import megatron_dynmoe.huggingface  # noqa: F401

    exported = result(with_te, EXPORTED_AGAIN).directory / "hf"
    # Beside what it loaded.
    path = result(before, WEIGHTS["shared"]).directory / "te_weights_shared.computed.pt"
    computed = torch.load(path, map_location="cpu")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(exported).eval()(computed["tokens"]).logits
    torch.testing.assert_close(logits, computed["logits"].float(), rtol=0, atol=1e-4)
