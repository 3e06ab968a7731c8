"""Gradients reduced during the backward pass, parameters gathered during the next forward pass.

Upstream then takes other ways through the optimizer's step, which the controller hangs on to.
"""

import dataclasses
import shlex

import pytest

from megatron_dynmoe.jobs.recipes import recipe_flags
from tests.distributed.harness import DTOP_P, TINY, Case, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

FAULTS = "tests.distributed.faults"
TRAIN = f"{TINY} {DTOP_P} --moe-token-dispatcher-type alltoall --use-distributed-optimizer"
# A bucket holds about a layer: several of them, or nothing would overlap.
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 20000"
EP2, PP2 = "--expert-model-parallel-size 2", "--pipeline-model-parallel-size 2"
CHECKED = "--moe-dynamic-check-ranks 1 --eval-interval 2 --eval-iters 1"


def pair(name: str, num_ranks: int, flags: str, *hooks: str) -> tuple[Case, Case]:
    """Without overlap, and with it."""
    hooks = tuple(f"{FAULTS}:{hook}" for hook in ("gathered_elements", *hooks))
    plain = Case(f"no_overlap_{name}", num_ranks, f"{TRAIN} {flags}", hooks=hooks)
    overlapped = dataclasses.replace(
        plain, name=f"overlap_{name}", flags=f"{plain.flags} {OVERLAP}"
    )
    return add(plain), add(overlapped)


SKIPPED = pair("dp2_skipped", 2, f"--train-iters 4 {CHECKED}", "second_step_is_skipped")
EP2_OF_4 = pair("ep2", 4, EP2)  # experts on two ranks, each part twice
PP2_DP2 = pair("pp2", 4, PP2)  # the layout of dtop_p_16e
SAVED = add(
    Case(
        "overlap_saved",
        4,
        f"{EP2_OF_4[1].flags} --save {{dir}}/overlap_saved --save-interval 2 --exit-interval 2",
    )
)
RESUMED = add(
    Case(
        "overlap_resumed",
        4,
        f"{EP2_OF_4[1].flags} --load {{dir}}/overlap_saved",
        after=(SAVED,),
    )
)
# The last of two values counts: a recipe, made small.
RECIPE = add(
    Case(
        "overlap_recipe",
        4,
        f"{shlex.join(recipe_flags('dtop_p_16e'))} {TINY} --num-experts 8",
        hooks=(f"{FAULTS}:gathered_elements",),
    )
)


def named(*cases, marks=()):
    return pytest.param(*cases, id=cases[0][1].name, marks=marks)


@pytest.mark.parametrize(
    "cases", [named(SKIPPED), named(EP2_OF_4), named(PP2_DP2, marks=[pytest.mark.long])]
)
def test_losses_counts_and_thresholds_are_those_without_overlap(results: Results, cases) -> None:
    plain, overlapped = (results[case] for case in cases)
    assert overlapped.losses == pytest.approx(plain.losses, rel=1e-6)
    assert overlapped.assignments == plain.assignments
    assert overlapped.thresholds == plain.thresholds
    for name in ("integral", "measured"):
        assert overlapped.by_layer(name) == plain.by_layer(name)


def test_a_skipped_step_moves_no_threshold(results: Results) -> None:
    skipped = results[SKIPPED[1]]
    assert [step["skipped"] for step in skipped.ranks[0]["steps"]] == [False, True, False, False]
    assert skipped.thresholds[1] == skipped.thresholds[0] != skipped.thresholds[2]


def test_a_checkpoint_holds_what_was_not_gathered_yet(results: Results) -> None:
    whole, resumed = results[EP2_OF_4[1]], results[RESUMED]
    assert resumed.losses == whole.losses[2:]
    assert resumed.assignments == whole.assignments[2:]
    assert resumed.thresholds == whole.thresholds[2:]


@pytest.mark.parametrize(
    ("cases", "times"),
    [named(EP2_OF_4, 2), named(PP2_DP2, 1, marks=[pytest.mark.long])],
)
def test_with_experts_on_several_ranks_upstream_gathers_twice_unless_it_overlaps(
    results: Results, cases, times
) -> None:
    """As docs/backends.md says. Overlapped, a step's parameters are gathered in the next."""
    plain, overlapped = (results[case] for case in cases)
    for one, other in zip(plain.ranks, overlapped.ranks, strict=True):
        (in_its_step,), (in_the_next,) = ({*rank["gathered"].values()} for rank in (one, other))
        # Each bucket is padded.
        assert in_its_step == pytest.approx(times * in_the_next, rel=0.01)


def test_recipes_overlap(results: Results) -> None:
    recipe = results[RECIPE]
    assert len(set(recipe.thresholds)) == len(recipe.losses) == 3
    assert recipe.losses[-1] < recipe.losses[0] - 0.1
    for rank in recipe.ranks:
        assert set(rank["gathered"]) == {"1", "2", "3"}  # the last at the end
