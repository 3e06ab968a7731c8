"""The most rows that an MoE layer can get, and the memory that rows need.

A row is one token at one expert. The number of rows is known only when the step runs; the cap gives
its upper bound. Sizes are those of the ``torch_native`` back end, because its autograd functions
state what they keep. ``docs/planning.md`` lists the terms.
"""

from __future__ import annotations

from typing import NamedTuple

# Bytes per row: its weight in float32; and in int64 its token, its index among the weights and, for
# the kernels, its index among the rows of its token.
BYTES_PER_ROW = 4 + 3 * 8
# Bytes per token and expert that plain PyTorch keeps for the gradients of the routing. In float32:
# logits less their mean, normalized logits, probabilities, clamped probabilities and their
# logarithm, and weights before and after renormalization. Then the routing map. The kernels keep
# less.
ROUTER_BYTES = 7 * 4 + 1


class ExpertSizes(NamedTuple):
    """The experts on one GPU.

    Attributes:
        ffn: the experts' FFN size on this GPU, that is, divided by expert tensor parallelism.
        gate_factor: 2 with SwiGLU, 1 without a gate.
        num_local: number of experts on this GPU.
        num_bytes: bytes of an activation: 2 in bf16, 4 in fp32.
        is_fused: whether the activation function is one kernel, forward and backward.
        keeps_rows, keeps_activations: whether the GEMMs' inputs are kept for the backward pass,
            which otherwise computes them again.
    """

    hidden: int
    ffn: int
    gate_factor: int
    num_local: int
    num_bytes: int
    is_fused: bool = False
    keeps_rows: bool = True
    keeps_activations: bool = True


def worst_case_rows(
    tokens: int, num_experts: int, expert_parallel: int, expert_tensor: int, cap: int | None
) -> int:
    """Compute the most rows that the experts of one GPU can get in one layer and micro-batch.

    Every token of every rank that shares experts with this one may choose as many of this GPU's
    experts as the cap allows.

    Args:
        tokens: number of tokens of one rank, after the sequence is split.
        num_experts: routed experts of the layer.
        expert_parallel: number of ranks over which the experts are spread.
        expert_tensor: number of ranks over which each expert is split. Each of them sees the rows
            of all.
        cap: the most experts that a token may use; None for no cap.
    """
    num_local = num_experts // expert_parallel
    experts = num_local if cap is None else min(cap, num_local)
    return tokens * expert_parallel * expert_tensor * experts


def mean_rows(tokens: int, expert_tensor: int, rows_per_token: float) -> float:
    """Compute the rows of each GPU in one layer and micro-batch under a balanced load."""
    return tokens * expert_tensor * rows_per_token


def kept_row_bytes(sizes: ExpertSizes, rows: float) -> float:
    """Compute the bytes that a layer keeps of its rows from the forward to the backward pass.

    It keeps the experts' inputs, the first GEMM's outputs and the second GEMM's inputs.
    """
    width = sizes.hidden * sizes.keeps_rows
    width += (sizes.gate_factor + sizes.keeps_activations) * sizes.ffn
    return rows * (width * sizes.num_bytes + BYTES_PER_ROW)


def passing_row_bytes(sizes: ExpertSizes, rows: float, sent_rows: float, is_spread: bool) -> float:
    """Compute the most temporary bytes of a layer, on top of what it keeps.

    This is the need of the largest of its steps, forward and backward.

    Args:
        rows: number of rows that the experts get.
        sent_rows: number of rows that this GPU sends, that is, its own tokens times their experts.
        is_spread: whether rows travel between GPUs.
    """
    hidden, ffn, size = sizes.hidden, sizes.ffn, sizes.num_bytes
    gate_up, weight = sizes.gate_factor * ffn, sizes.num_local * hidden * ffn * size
    # Gradients of the activation's output and of its input; and, if it is not one kernel, what lies
    # between. The weights of the rows are float32, so products with half-precision values are
    # computed in float32.
    activation = (gate_up + ffn) * size
    if not sizes.is_fused:
        activation += 2 * ffn * size + (2 * 4 * ffn if size < 4 else ffn * size)
    # Communication needs copies of rows before and after it, and frees them late. Over gloo (EP 2
    # on CPU) up to seven copies were seen at once; their number differs from step to step.
    travel = (4 * rows + 3 * sent_rows) * hidden * size if is_spread else 0.0
    steps = (
        2 * rows * hidden * size,  # dispatch and combine, either way
        # Second GEMM, activation and first GEMM, backward.
        rows * (hidden + (2 - sizes.keeps_activations) * ffn) * size + weight,
        rows * activation + weight,
        rows * (gate_up + (2 - sizes.keeps_rows) * hidden) * size + sizes.gate_factor * weight,
    )
    return max(steps) + travel
