"""Checkpoints: what a resumed run shares with one that never stopped.

Compares the tensors of checkpoints, not log lines. A run takes 6 steps; another goes on from its
checkpoint after 3. Before its first step it saves what it has loaded, so that what arrived can be
told from what the next steps made of it.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dynmoe.settings.distribution import KNOTS
from megatron_dynmoe.upstream import optimizer_state
from tests.distributed.agreement import GRADIENTS, assert_same_gradients, tensors
from tests.distributed.harness import DTOP_P, SEQ_TOP_K, TINY, Case, CaseResult, Results, add
from tests.distributed.selection import matrix

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

HALF, STEPS = 3, 6
TOP_K = (
    f"{TINY} --num-layers 2 --num-experts 4 --micro-batch-size 1 --train-iters {STEPS} "
    f"--split 1,0,0 --ckpt-format torch_dist --save-interval {HALF}"
)
MODEL = f"{TOP_K} {DTOP_P}"
FOUR_LAYERS = "--num-layers 4"
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
BF16 = "--bf16"
DISTRIBUTED = "--use-distributed-optimizer"
RESHARDABLE = f"{DISTRIBUTED} --dist-ckpt-optim-fully-reshardable"

# Name: number of ranks and flags.
LAYOUTS = {
    "one": (1, ""),
    "dp2": (2, ""),
    "ep2": (2, "--expert-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "interleaved": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "tp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
}


def run(name: str, layout: str, flags: str = "", model: str = MODEL) -> Case:
    """A run with checkpoints after the half and at the end."""
    num_ranks, layout_flags = LAYOUTS[layout]
    flags = f"{model} {layout_flags} --save {{dir}}/{name} {flags}"
    return add(Case(name, num_ranks, flags, hooks=() if model == TOP_K else gradient_hooks(flags)))


def gradient_hooks(flags: str) -> tuple[str, ...]:
    """None if gradients are in bf16, or each rank has the reduced ones of its own part only."""
    return () if BF16 in flags or DISTRIBUTED in flags else GRADIENTS


def resume(name: str, origin: Case, layout: str, flags: str = "", hook: str = "saved_as_loaded"):
    """A run that goes on from the half of another."""
    num_ranks, layout_flags = LAYOUTS[layout]
    flags = (
        f"{MODEL} {layout_flags} --load {{dir}}/{origin.name} --ckpt-step {HALF} "
        f"--save {{dir}}/{name} {flags}"
    )
    hooks = (f"{__name__}:{hook}", *gradient_hooks(flags))
    return add(Case(name, num_ranks, flags, hooks=hooks, after=(origin,)))


@contextlib.contextmanager
def saved_as_loaded(recorder: Any) -> Iterator[None]:
    """Save a checkpoint between loading and the first step."""
    from megatron.training import get_args, training

    train = training.train

    def save_then_train(forward_step, model, optimizer, scheduler, *args, **kwargs):
        training.save_checkpoint(get_args().iteration, model, optimizer, scheduler, 0)
        return train(forward_step, model, optimizer, scheduler, *args, **kwargs)

    training.train = save_then_train
    try:
        yield
    finally:
        training.train = train
        recorder.result["processes"] = len(multiprocessing.active_children())


@contextlib.contextmanager
def unpatched(recorder: Any) -> Iterator[None]:
    """Take the patches of the optimizers away."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (ChainedOptimizer, "load_state_dict"),
            (DistributedOptimizer, "state_dict"),
            (DistributedOptimizer, "load_state_dict"),
            (DistributedOptimizer, "_set_main_param_and_optimizer_states"),
        ):
            patch.setattr(owner, name, getattr(owner, name).__wrapped__)
        yield


ONE = run("one_whole", "one")
ONE_DROPOUT = run("one_dropout", "one", DROPOUT)
EP2 = run("ep2_whole", "ep2")
PP2 = run("pp2_whole", "pp2")
PP2_DROPOUT = run("pp2_dropout", "pp2", DROPOUT)
PP2EP2 = run("pp2ep2_whole", "pp2ep2")
INTERLEAVED = run("interleaved_whole", "interleaved", FOUR_LAYERS)
EP2_BF16 = run("ep2_bf16", "ep2", BF16)
DIST_DP2 = run("dist_dp2", "dp2", RESHARDABLE)
DIST_DP2_HALF = run("dist_dp2_half", "dp2", f"{DISTRIBUTED} --exit-interval {HALF}")
# The first stage has no experts, and an optimizer for experts all the same.
DENSE_FIRST = f"{RESHARDABLE} --moe-layer-freq ([0]*1+[1]*1)"
DIST_DENSE_FIRST = run("dist_dense_first", "pp2ep2", DENSE_FIRST)
DIST_EP2_BF16 = run("dist_ep2_bf16", "ep2", f"{RESHARDABLE} {BF16}")
DRAWN_TARGET = "--moe-dynamic-target-experts-per-token uniform(1,3) --seed 7"
DRAWN = run("drawn", "pp2ep2", DRAWN_TARGET)
SEQ_TOP_K_RUN = run("seq_top_k", "one", SEQ_TOP_K)
NULLS_FLAGS = (
    "--moe-dynamic-routing null_experts --moe-dynamic-null-kind identity "
    "--moe-dynamic-weights raw --moe-dynamic-scope global --moe-dynamic-balance-loss seq_aux_loss"
)
NULLS = run("nulls", "ep2", NULLS_FLAGS)
TOP_K_RUN = run("top_k", "one", model=TOP_K)

SAME_LAYOUT = {
    "one": (ONE, resume("one_resumed", ONE, "one")),
    "one, dropout": (ONE_DROPOUT, resume("one_dropout_resumed", ONE_DROPOUT, "one", DROPOUT)),
    "ep2": (EP2, resume("ep2_resumed", EP2, "ep2")),
    "pp2, dropout": (PP2_DROPOUT, resume("pp2_dropout_resumed", PP2_DROPOUT, "pp2", DROPOUT)),
    "pp2ep2, drawn target": (DRAWN, resume("drawn_resumed", DRAWN, "pp2ep2", DRAWN_TARGET)),
    "one, seq_top_k": (
        SEQ_TOP_K_RUN,
        resume("seq_top_k_resumed", SEQ_TOP_K_RUN, "one", SEQ_TOP_K),
    ),
    "ep2, null experts": (NULLS, resume("nulls_resumed", NULLS, "ep2", NULLS_FLAGS)),
    # From the optimizer's default format into the one whose tensors have no undefined padding.
    "dp2, distributed": (DIST_DP2, resume("dist_resumed", DIST_DP2_HALF, "dp2", RESHARDABLE)),
}
EP2_RESUMED = SAME_LAYOUT["ep2"][1]
OTHER_LAYOUT = {
    f"{origin.name} to {layout}": (
        origin,
        resume(f"{origin.name}_to_{layout}", origin, layout, flags),
    )
    for origin, layout, flags in (
        (EP2, "one", ""),
        (EP2, "pp2", ""),
        (ONE, "ep2", ""),
        (PP2, "one", ""),
        (PP2EP2, "one", ""),
        (INTERLEAVED, "one", FOUR_LAYERS),
        (EP2_BF16, "one", BF16),
        (DIST_DP2, "pp2", RESHARDABLE),
        (DIST_DENSE_FIRST, "one", DENSE_FIRST),
        (DIST_EP2_BF16, "one", f"{RESHARDABLE} {BF16}"),
        (DRAWN, "one", DRAWN_TARGET),
        (DRAWN, "tp2", DRAWN_TARGET),
        (SEQ_TOP_K_RUN, "tp2", f"{SEQ_TOP_K} --make-vocab-size-divisible-by 4"),
        (NULLS, "pp2", NULLS_FLAGS),
    )
}
# Without experts' tensor parallelism; one rank pads 115 ids to 120, two pad them to 128.
PADDED = "--vocab-size 114"
ONE_PADDED = run("one_padded", "one", PADDED)
TP2_PADDED = run("tp2_padded", "tp2", PADDED)
PER_TOKEN = "--calculate-per-token-loss --moe-dynamic-balance-loss-coeff 0.1"
ONE_PER_TOKEN = run("one_per_token", "one", f"{PADDED} {PER_TOKEN}")
OTHER_PADDING = {
    "one to tp2": (ONE_PADDED, resume("one_to_tp2", ONE_PADDED, "tp2", PADDED)),
    "tp2 to one": (TP2_PADDED, resume("tp2_to_one", TP2_PADDED, "one", PADDED)),
    "one to tp2, per token": (
        ONE_PER_TOKEN,
        resume("per_token_to_tp2", ONE_PER_TOKEN, "tp2", f"{PADDED} {PER_TOKEN}"),
    ),
}
NEW_SCHEDULE = (
    "--lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --weight-decay 0.3 "
    "--override-opt-param-scheduler"
)
OTHER_SCHEDULE = {
    f"{origin.name} on {layout}": (
        origin,
        resume(f"{origin.name}_lr_{layout}", origin, layout, f"{flags} {NEW_SCHEDULE}"),
    )
    for origin, layout, flags in (
        (ONE, "one", ""),
        (EP2, "ep2", ""),
        (EP2, "one", ""),
        (PP2, "pp2", ""),
        (DIST_DP2, "pp2", RESHARDABLE),
        (DIST_EP2_BF16, "ep2", f"{RESHARDABLE} {BF16}"),
    )
}
# Whatever the command line says, the run goes on by the schedule of its checkpoint.
DECOUPLED_LR = "--decoupled-lr 3e-3 --decoupled-min-lr 3e-4"
DECOUPLED = run("decoupled", "ep2", DECOUPLED_LR)
ANOTHER = "--lr 1e-3 --min-lr 1e-4 --weight-decay 0.3 --lr-decay-style constant"
SAVED_SCHEDULE = {
    f"{origin.name} on {layout}": (
        origin,
        resume(
            f"{origin.name}_by_checkpoint_{layout}",
            origin,
            layout,
            f"{flags} {ANOTHER} --use-checkpoint-opt-param-scheduler",
        ),
    )
    for origin, layout, flags in (
        (ONE, "one", ""),
        (EP2, "one", ""),
        (DIST_DP2, "dp2", RESHARDABLE),
        (DECOUPLED, "ep2", "--decoupled-lr 9e-3 --decoupled-min-lr 9e-4"),
    )
}
NEW_DECOUPLED = resume(
    "decoupled_anew",
    DECOUPLED,
    "one",
    f"{NEW_SCHEDULE} --decoupled-lr 2e-3 --decoupled-min-lr 2e-3",
)
NOT_DECOUPLED = resume("not_decoupled", DECOUPLED, "ep2", "--override-opt-param-scheduler")
REFUSED = {
    "--lr 1e-3": "--lr is 0.001, and the run in .* has 0.01: .*--override-opt-param-scheduler",
    "--train-iters 9": "--train-iters is 9, and the run in .* has 6: .*--lr-decay-iters 6 for",
    "--global-batch-size 4": "--global-batch-size is 4, and the run in .* has 8: .*in samples.*"
    "--override-opt-param-scheduler",
    "--hidden-size 64": "--hidden-size is 64, and the model in .* has 32: give --hidden-size 32",
    "--num-experts 8": "--num-experts is 8, and the model in .* has 4",
    "--num-layers 3": "--num-layers is 3, and the model in .* has 2",
}
REFUSALS = {
    flags: resume(f"not_resumed_{number}", ONE, "one", flags)
    for number, flags in enumerate(REFUSED)
}
OTHER_TARGET = resume("target_3", ONE, "one", "--moe-dynamic-target-experts-per-token 3")
ONE_TARGET_DRAWN = resume("one_target_drawn", ONE, "one", DRAWN_TARGET)
MAP_AFRESH = resume("map_afresh", ONE, "one", f"{DRAWN_TARGET} --dist-ckpt-strictness log_all")
OTHER_RANGE = resume(
    "other_range", DRAWN, "one", "--moe-dynamic-target-experts-per-token uniform(2,4) --seed 7"
)
FROM_TOP_K = resume(
    "from_top_k", TOP_K_RUN, "one", "--dist-ckpt-strictness log_all --no-load-optim"
)
UNPATCHED_EP = resume("unpatched_ep", EP2, "one", hook="unpatched")
UNPATCHED_DIST = resume("unpatched_dist", DIST_DP2, "one", RESHARDABLE, hook="unpatched")


@pytest.mark.parametrize(
    "name",
    matrix(
        SAME_LAYOUT,
        (
            *("one, dropout", "ep2", "pp2, dropout", "dp2, distributed", "one, seq_top_k"),
            "ep2, null experts",
        ),
    ),
)
def test_resume_equals_one_go_bitwise(results: Results, name: str) -> None:
    whole, resumed = (results[case] for case in SAME_LAYOUT[name])
    assert resumed.losses == whole.losses[HALF:]
    assert differences(checkpoint(whole), checkpoint(resumed)) == {}


@pytest.mark.parametrize(
    "name",
    matrix(
        OTHER_LAYOUT,
        (
            *("ep2_whole to pp2", "pp2ep2_whole to one", "interleaved_whole to one"),
            *("ep2_bf16 to one", "dist_dp2 to pp2", "dist_dense_first to one"),
        ),
    ),
)
def test_another_layout_loads_every_tensor_and_goes_on(results: Results, name: str) -> None:
    origin, resumed = (results[case] for case in OTHER_LAYOUT[name])
    assert differences(checkpoint(origin, HALF), checkpoint(resumed, HALF)) == {}
    # In bf16 another order of summation shows.
    tolerance = 1e-3 if BF16 in origin.case.flags else 1e-5
    assert len(resumed.losses) == STEPS - HALF
    assert resumed.losses == pytest.approx(origin.losses[HALF:], rel=tolerance)
    if tolerance == 1e-5:
        assert differences(checkpoint(origin), checkpoint(resumed), tolerance) == {}
    if gradient_hooks(origin.case.flags):
        # With null slots, routers have a hundredth of the attention's gradients, from which
        # rounding (4e-9 in every matrix) reaches them.
        share = {"tolerance": 2e-5} if origin is results[NULLS] else {}
        assert_same_gradients(origin, resumed, step=HALF, **share)


@pytest.mark.parametrize("name", matrix(OTHER_PADDING, ("tp2 to one", "one to tp2, per token")))
def test_a_vocabulary_that_would_be_padded_otherwise_keeps_its_size(
    results: Results, name: str
) -> None:
    origin, resumed = (results[case] for case in OTHER_PADDING[name])
    assert differences(checkpoint(origin, HALF), checkpoint(resumed, HALF)) == {}
    assert resumed.losses == pytest.approx(origin.losses[HALF:], rel=1e-5)


@pytest.mark.parametrize("name", matrix(OTHER_SCHEDULE, ("ep2_whole on one", "dist_dp2 on pp2")))
def test_another_schedule_takes_the_optimizers_state_along(results: Results, name: str) -> None:
    origin, resumed = (results[case] for case in OTHER_SCHEDULE[name])
    expected, loaded = checkpoint(origin, HALF), checkpoint(resumed, HALF)
    assert {*differences(expected, loaded)} <= {"lr", "weight_decay", "scheduler"}
    assert loaded["scheduler"]["max_lr"] == checkpoint(resumed)["scheduler"]["max_lr"] == 1e-3
    assert checkpoint(resumed)["lr"] == {1e-3}
    assert checkpoint(resumed)["weight_decay"] == {0.0, 0.3}
    # The next batch is the model's as it was; those after it were trained with smaller steps.
    tolerance = 1e-3 if BF16 in origin.case.flags else 1e-5
    assert resumed.losses[0] == pytest.approx(origin.losses[HALF], rel=tolerance)
    assert resumed.losses[-1] != pytest.approx(origin.losses[-1], rel=1e-4)


@pytest.mark.parametrize("name", matrix(SAVED_SCHEDULE, ("one_whole on one", "decoupled on ep2")))
def test_the_saved_schedule_goes_on_whatever_the_flags_say(results: Results, name: str) -> None:
    origin, resumed = (results[case] for case in SAVED_SCHEDULE[name])
    assert differences(checkpoint(origin, HALF), checkpoint(resumed, HALF)) == {}
    assert resumed.losses == pytest.approx(origin.losses[HALF:], rel=1e-5)
    assert differences(checkpoint(origin), checkpoint(resumed), 1e-5) == {}


def test_another_schedule_leaves_embeddings_a_rate_of_their_own(results: Results) -> None:
    origin, resumed = results[DECOUPLED], results[NEW_DECOUPLED]
    found = differences(checkpoint(origin, HALF), checkpoint(resumed, HALF))
    assert {*found} <= {"lr", "weight_decay", "scheduler"}
    assert checkpoint(resumed)["lr"] == {1e-3, 2e-3}


def test_embeddings_do_not_lose_their_rate_in_silence(results: Results) -> None:
    assert re.search(
        "--decoupled-lr is not given, and the run in .* has 0.003: .* --decoupled-lr 0.003, or "
        "give --no-load-optim",
        results.any(NOT_DECOUPLED).error or "it was accepted",
    )


@pytest.mark.parametrize("flags", REFUSED)
def test_what_the_checkpoint_has_otherwise_is_refused_by_name(results: Results, flags: str) -> None:
    result = results.any(REFUSALS[flags])
    message = (result.error or "it was accepted").strip().splitlines()[-1]
    assert re.match(f"UsageError: {REFUSED[flags]}", message), message
    assert result.ranks[0]["steps"] == []


def test_saving_starts_no_process(results: Results) -> None:
    assert [rank["processes"] for rank in results[EP2_RESUMED].ranks] == [0, 0]


def test_router_state_is_float32_in_bf16(results: Results) -> None:
    router = "decoder.layers.mlp.router."
    saved = checkpoint(results[EP2_BF16])
    threshold = saved[router + "threshold"]
    assert threshold.dtype == saved[router + "integral"].dtype == torch.float32
    assert not torch.equal(threshold, threshold.bfloat16().float())
    assert saved[router + "theta_offset"].abs().min() > 0


def test_threshold_goes_on_with_another_target(results: Results) -> None:
    origin, resumed = results[ONE], results[OTHER_TARGET]
    # The first batch is routed as it would have been; from then on the new target holds.
    assert resumed.experts_per_token[0] == origin.experts_per_token[HALF]
    assert resumed.experts_per_token[-1] == pytest.approx(3, rel=0.1)


def test_a_drawn_target_has_its_map_in_the_checkpoint(results: Results) -> None:
    saved = checkpoint(results[DRAWN])
    router = "decoder.layers.mlp.router."
    targets, thresholds = (saved[router + name] for name in ("knot_targets", "knot_thresholds"))
    assert targets.shape == thresholds.shape == (2, 5)
    assert targets[0].tolist() == pytest.approx([1, 3**0.25, 3**0.5, 3**0.75, 3])
    assert (thresholds.diff(dim=1) > 0).all() and torch.equal(thresholds[0], thresholds[1])
    assert saved[router + "knot_integrals"].abs().max() > 0
    # For evaluations, the threshold is that of the mean target, 2.
    threshold = saved[router + "threshold"][0]
    assert thresholds[0, 2] < threshold < thresholds[0, 3]


def test_a_map_goes_on_with_another_range(results: Results) -> None:
    """At targets that both ranges have, it is the same map; beyond, it goes on from its end."""
    router = "decoder.layers.mlp.router."
    before, after = (checkpoint(results[case], HALF) for case in (DRAWN, OTHER_RANGE))
    assert after[router + "knot_targets"][0].tolist() == pytest.approx(
        [2, 2**1.25, 2**1.5, 2**1.75, 4]
    )
    for name in ("knot_thresholds", "knot_integrals"):
        old, new = before[router + name][0], after[router + name][0]
        assert min(old[2], old[3]) <= new[0] <= max(old[2], old[3])
        assert new[-1] == old[-1]
    assert len(results[OTHER_RANGE].losses) == STEPS - HALF


def test_a_checkpoint_of_one_target_has_no_map(results: Results) -> None:
    error = results.any(ONE_TARGET_DRAWN).error or "it was accepted"
    assert re.search(
        r"was trained at one target, so its routers have no knot_integrals, knot_targets, "
        r"knot_thresholds, .*--dist-ckpt-strictness log_all",
        error,
    )
    loaded = checkpoint(results[MAP_AFRESH], HALF)
    origin = checkpoint(results[ONE], HALF)
    added = {name for name in loaded if is_model(name)} - origin.keys()
    assert {name.rpartition(".")[2] for name in added} == {*KNOTS}
    assert {*differences(origin, loaded)} == added


def test_weights_of_a_top_k_run_can_be_loaded(results: Results) -> None:
    loaded = checkpoint(results[FROM_TOP_K], HALF)
    weights = {
        name: x for name, x in checkpoint(results[TOP_K_RUN], HALF).items() if is_model(name)
    }
    added = {name for name in loaded if is_model(name)} - weights.keys()
    state = {"threshold", "integral", "theta_offset", "measured"}
    assert {name.rpartition(".")[2] for name in added} == state
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("case", "error"),
    [(UNPATCHED_EP, "Could not find parameter group"), (UNPATCHED_DIST, "assert len(steps) == 1")],
    ids=["ep", "distributed"],
)
def test_upstream_still_needs_the_patches(results: Results, case: Case, error: str) -> None:
    assert error in (results.any(case).error or "it resumes: remove the patch")


def test_parameter_groups_without_counterpart_are_refused() -> None:
    def group(**changes: Any) -> dict[str, Any]:
        return {"max_lr": 1e-3, "wd_mult": 1.0, "is_expert_parallel": False} | changes

    saved = {"state": {"common_step": 3}, "param_groups": [group()]}
    optimizers = [SimpleNamespace(param_groups=[group(is_expert_parallel=b)]) for b in (0, 1)]
    both = optimizer_state.restructured(saved, optimizers)
    assert [part["param_groups"][0]["max_lr"] for part in both.values()] == [1e-3, 1e-3]
    assert [part["state"]["common_step"] for part in both.values()] == [3, 3]

    optimizers[1].param_groups[0]["max_lr"] = 1e-4
    with pytest.raises(ValueError, match=r"max_lr.*--no-load-optim"):
        optimizer_state.restructured(saved, optimizers)


def checkpoint(result: CaseResult, iteration: int = STEPS) -> dict[str, Any]:
    """The tensors of a checkpoint and what stands beside them, by name."""
    return _read(result.directory / result.case.name / f"iter_{iteration:07d}")


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    state = tensors(path)
    common = load_common_state_dict(path)
    # Sets, because a layout with expert parallelism has more parameter groups.
    for name in ("common_step", "step", "lr", "weight_decay"):
        state[name] = {float(value) for value in find(name, common["optimizer"])}
    return state | {"scheduler": common["opt_param_scheduler"], "iteration": common["iteration"]}


def find(name: str, tree: Any) -> Iterator[Any]:
    """Every value under a name, however deep."""
    if isinstance(tree, dict):
        yield from ([tree[name]] if name in tree else [])
    for branch in tree.values() if isinstance(tree, dict) else tree if type(tree) is list else ():
        yield from find(name, branch)


def is_model(name: str) -> bool:
    return name.startswith(("decoder.", "embedding.", "output_layer."))


def differences(
    expected: dict[str, Any], actual: dict[str, Any], tolerance: float = 0
) -> dict[str, Any]:
    """What differs between two checkpoints, by name."""
    found: dict[str, Any] = {name: "in one only" for name in expected.keys() ^ actual.keys()}
    for name in expected.keys() & actual.keys():
        a, b = expected[name], actual[name]
        if not isinstance(a, torch.Tensor):
            if a != b:
                found[name] = (a, b)
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            found[name] = (a.dtype, b.dtype, a.shape, b.shape)
        elif not torch.allclose(a, b, rtol=tolerance, atol=tolerance):
            found[name] = (a - b).abs().max().item()
    return found
