"""The most rows that an MoE layer can get, and the memory that rows need.

A row is one token at one expert. How many there are is only known when the step runs; how many
there can be follows from the cap. Sizes are those of the ``torch_native`` back end, whose autograd
functions say what they keep; ``docs/planning.md`` lists the terms.
"""

from __future__ import annotations

from typing import NamedTuple

# Of each row: its weight in float32, its token, its place among the weights and, for the kernels,
# among the rows of its token.
BYTES_PER_ROW = 4 + 3 * 8
# Of each token and expert, what plain PyTorch keeps for the gradients of the routing, in float32:
# logits less their mean, normalized logits, probabilities, these bounded and their logarithm, and
# weights before and after renormalization; and the routing map. The kernels keep less.
ROUTER_BYTES = 7 * 4 + 1
# For a moment: sorted probabilities, and order, units and sums in int64.
SELECTION_BYTES = 4 + 4 * 8
# Counts, splits, indices of experts and their like, which do not grow with rows.
SMALL_BYTES = 1 << 16


class ExpertSizes(NamedTuple):
    """The experts on one GPU.

    Attributes:
        ffn: the experts' FFN size on this GPU, that is, divided by expert tensor parallelism.
        gate_factor: 2 with SwiGLU, 1 without a gate.
        num_local: experts on this GPU.
        num_bytes: of an activation: 2 in bf16, 4 in fp32.
    """

    hidden: int
    ffn: int
    gate_factor: int
    num_local: int
    num_bytes: int


def worst_case_rows(
    tokens: int, num_experts: int, expert_parallel: int, expert_tensor: int, cap: int | None
) -> int:
    """The most rows that the experts of one GPU can get in one layer and micro-batch.

    Every token of every rank that shares experts with this one may choose as many of this GPU's
    experts as the cap allows.

    Args:
        tokens: of one rank, after the sequence is split.
        num_experts: routed experts of the layer.
        expert_parallel: ranks over which they are spread.
        expert_tensor: ranks over which each is split; each sees the rows of all of them.
        cap: most experts of a token; None for no cap.
    """
    num_local = num_experts // expert_parallel
    experts = num_local if cap is None else min(cap, num_local)
    return tokens * expert_parallel * expert_tensor * experts


def mean_rows(tokens: int, expert_tensor: int, rows_per_token: float) -> float:
    """The rows that each GPU gets in one layer and micro-batch where the load is balanced."""
    return tokens * expert_tensor * rows_per_token


def kept_row_bytes(sizes: ExpertSizes, rows: float) -> float:
    """What a layer keeps of its rows from the forward to the backward pass.

    The experts' inputs, the first GEMM's outputs and the second's inputs.
    """
    width = sizes.hidden + (sizes.gate_factor + 1) * sizes.ffn
    return rows * (width * sizes.num_bytes + BYTES_PER_ROW)


def passing_row_bytes(sizes: ExpertSizes, rows: float, sent_rows: float, is_spread: bool) -> float:
    """The most that a layer needs for a moment on top of what it keeps.

    The largest of its steps, forward and backward.

    Args:
        rows: that the experts get.
        sent_rows: that this GPU sends, its own tokens times their experts.
        is_spread: rows travel between GPUs.
    """
    hidden, ffn, size = sizes.hidden, sizes.ffn, sizes.num_bytes
    gate_up, weight = sizes.gate_factor * ffn, sizes.num_local * hidden * ffn * size
    # Products with the weights in float32: those of half precision are converted.
    wide = 2 * 4 * ffn if size < 4 else ffn * size
    # Copies before and after; communication lets go of them late. Of all sizes, up to seven were
    # seen at once over gloo (EP 2 on CPU), in numbers that differ from step to step.
    travel = (4 * rows + 3 * sent_rows) * hidden * size if is_spread else 0.0
    steps = (
        2 * rows * hidden * size,  # dispatch and combine, either way
        rows * (hidden + ffn) * size + weight,  # second GEMM, backward
        rows * ((gate_up + 3 * ffn) * size + wide),  # activation, backward
        rows * (gate_up + hidden) * size + sizes.gate_factor * weight,  # first GEMM, backward
    )
    return max(steps) + travel


def layer_bound(
    sizes: ExpertSizes,
    tokens: int,
    num_experts: int,
    expert_parallel: int,
    expert_tensor: int,
    cap: int | None,
) -> float:
    """Bytes that one MoE layer, router included, can need in a step besides its weights.

    For one micro-batch, forward and backward, with any routing that the cap allows; arguments as
    for :func:`worst_case_rows`.
    """
    rows = worst_case_rows(tokens, num_experts, expert_parallel, expert_tensor, cap)
    sent_rows = tokens * (num_experts if cap is None else min(cap, num_experts))
    is_spread = expert_parallel * expert_tensor > 1
    # The tokens, the sums of their rows, and the gradients of both.
    around = 4 * tokens * sizes.hidden * sizes.num_bytes
    # Selecting is over before there are rows.
    rows_bytes = kept_row_bytes(sizes, rows) + passing_row_bytes(sizes, rows, sent_rows, is_spread)
    router = tokens * num_experts * ROUTER_BYTES
    selecting = tokens * num_experts * SELECTION_BYTES
    return around + router + max(rows_bytes, selecting) + SMALL_BYTES
