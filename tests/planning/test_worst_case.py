"""The bound on an MoE layer's memory against what a layer allocates at its worst."""

import pytest
import torch

from megatron_dynmoe.planning.worst_case import (
    BYTES_PER_ROW,
    ROUTER_BYTES,
    ExpertSizes,
    kept_row_bytes,
    passing_row_bytes,
    worst_case_rows,
)
from megatron_dynmoe.settings.config import DynMoEConfig
from tests.distributed.planning_cases import peak_bytes
from tests.moe import one_rank
from tests.moe.test_recompute import MOE_ACT

pytestmark = pytest.mark.megatron
TOP_P = {"routing": "top_p", "threshold": 1.0}  # every token takes as many as the cap allows
DTOP_P = {"routing": "dtop_p", "target_experts_per_token": 1, "initial_threshold": 1.0}


@pytest.fixture(autouse=True)
def megatron():
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()


@pytest.mark.parametrize(
    ("num_experts", "cap", "hidden", "ffn", "routing", "dtype"),
    [
        (8, None, 64, 96, TOP_P, torch.float32),
        (8, 2, 64, 96, DTOP_P, torch.float32),
        (8, 2, 64, 96, DTOP_P, torch.bfloat16),
        (16, 4, 128, 32, TOP_P, torch.float32),  # wide tokens, narrow experts
        (64, 8, 32, 16, DTOP_P, torch.float32),  # the router is a large part
        (4, 1, 16, 256, DTOP_P, torch.float32),  # weights of experts outweigh rows
    ],
)
@pytest.mark.parametrize("kernels", ["", "0", "moe_act"])
def test_a_layer_stays_within_its_bound(
    monkeypatch, num_experts, cap, hidden, ffn, routing, dtype, kernels
):
    recomputed = {}
    if kernels == "moe_act":  # with plain PyTorch
        kernels, recomputed = "0", MOE_ACT
    monkeypatch.setenv("DYNMOE_KERNELS", kernels)
    layer = one_rank.moe_layer(
        DynMoEConfig(max_experts_per_token=cap, **routing),
        num_experts=num_experts,
        hidden_size=hidden,
        moe_ffn_hidden_size=ffn,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **recomputed,
    )
    hidden_SBD = torch.randn(256, 2, hidden, dtype=dtype, requires_grad=True)

    def step():
        layer(hidden_SBD)[0].sum().backward()

    step()  # what stays for good is made
    layer.zero_grad()
    hidden_SBD.grad = None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()

    assert layer.router.counters.sums.assignments.sum() == 2 * 512 * (cap or num_experts)
    keeps = not recomputed
    sizes = ExpertSizes(
        hidden,
        ffn,
        2,
        num_experts,
        dtype.itemsize,
        keeps_rows=keeps,
        keeps_activations=keeps,
    )
    bound = layer_bound(sizes, 512, num_experts, cap)
    assert peak_bytes(profiler) <= bound <= 1.6 * peak_bytes(profiler)


def test_what_a_layer_of_the_papers_model_keeps_of_its_rows():
    """Hidden 1024, FFN 2816, 8 x 2048 tokens at 2 experts, in bf16."""
    sizes = ExpertSizes(1024, 2816, 2, 16, 2, is_fused=True)
    rows = 2 * 8 * 2048
    index = rows * BYTES_PER_ROW
    assert kept_row_bytes(sizes, rows) - index == pytest.approx(621e6, rel=0.001)
    less = sizes._replace(keeps_rows=False, keeps_activations=False)
    assert kept_row_bytes(less, rows) - index < 400e6


def layer_bound(sizes: ExpertSizes, tokens: int, num_experts: int, cap: int | None) -> float:
    """The most bytes of one layer in a step, from the parts that the planner adds up."""
    rows = worst_case_rows(tokens, num_experts, 1, 1, cap)
    # The tokens, the sums of their rows, and the gradients of both. While the activation is at
    # work, there is a further copy, for which rows that are kept, but free by then, make room.
    around = (5 - sizes.keeps_rows) * tokens * sizes.hidden * sizes.num_bytes
    of_rows = kept_row_bytes(sizes, rows) + passing_row_bytes(sizes, rows, rows, is_spread=False)
    # Sorted probabilities; order, units and sums in int64. They are freed before there are rows.
    selecting = tokens * num_experts * (4 + 4 * 8)
    small = 80_000  # counts, splits, and other things that do not grow with rows
    return around + tokens * num_experts * ROUTER_BYTES + max(of_rows, selecting) + small


def brute_force_rows(tokens, num_experts, ranks, cap):
    """Route every token of every rank to the first experts, and count those of rank 0."""
    chosen = range(min(cap or num_experts, num_experts))
    local = num_experts // ranks
    return sum(expert < local for _ in range(ranks * tokens) for expert in chosen)


@pytest.mark.parametrize("cap", [None, 1, 2, 3, 8, 16])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_rows_are_those_of_all_tokens_at_one_rank(ranks, cap):
    assert worst_case_rows(5, 16, ranks, 1, cap) == brute_force_rows(5, 16, ranks, cap)


def test_each_part_of_an_expert_sees_all_rows():
    assert worst_case_rows(5, 8, 2, 4, 3) == 4 * worst_case_rows(5, 8, 2, 1, 3)
