"""The least time of each Triton kernel of a layer, from its operands; nothing is measured.

    python benchmarks/kernel_rooflines.py

It runs a layer and its rotary positions, forward and backward, with tensors that have sizes and no
values, and adds up what each kernel is launched with: every byte once, also of a tensor from which
rows are gathered, and twice if a tensor is added to. The least time is the larger of two: bytes
over the memory's bandwidth, and FLOPs of matrix products over the peak of bf16, both of the data
sheet. The layer is workload a of layer.py, in bf16, with DTop-p and fused experts.
``tools/generate_docs.py`` writes the table into docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.layer_providers import WORKLOADS, Workload
from megatron_dynmoe import kernels
from megatron_dynmoe.dry_run.devices import known
from megatron_dynmoe.dry_run.recording.traffic import bytes_of
from megatron_dynmoe.kernels.permute import order_by_expert
from megatron_dynmoe.kernels.rope import rotate
from megatron_dynmoe.kernels.routing_triton import route_fused
from megatron_dynmoe.moe import fused
from megatron_dynmoe.moe.permute import RowOrder
from megatron_dynmoe.planning.gpus import GPUS
from megatron_dynmoe.settings.messages.command_line import CommandParser

# Bytes per second of the memory by the data sheets of the H200 and the A800 (80 GB, SXM).
BANDWIDTHS = {"h200-141g": 4.8e12, "a800-80g": 2.039e12}
HEAD_SIZE = 64
# Each launch in the order of a step: the operator, its kernel, and what it does.
LAUNCHES = (
    ("route_forward", "_forward", "routing: normalize, softmax, select, weigh, count"),
    ("add_up_parts", "_add_up_parts", "routing: sums over programs"),
    ("count_chosen", "_count_chosen", "order of rows: counts by expert and by token"),
    ("number_rows", "_number_rows", "order of rows: their numbers"),
    ("gate_and_up", "_gate_and_up", "first GEMM with gather and SwiGLU"),
    ("multiply_each_row", "_multiply_rows` or `grouped_mm", "second GEMM"),
    ("add_rows", "_sum_rows", "sum of each token's rows"),
    ("gate_and_up_backward", "_gate_and_up_backward", "backward: gate and up; activation again"),
    ("multiply_all_rows", "_multiply_by_rows", "backward: second weight, added in float32"),
    ("multiply_all_rows", "_multiply_by_rows", "backward: first weight, added in float32"),
    ("multiply_each_row", "_multiply_rows` or `grouped_mm", "backward: rows"),
    ("add_rows", "_sum_rows", "backward: sum of each token's rows"),
    ("route_backward", "_backward", "backward: routing"),
    ("rotate_pairs", "_rotate", "rotary positions of queries; keys take as much"),
    ("rotate_pairs", "_rotate", "backward: the same"),
)


class Launch(NamedTuple):
    """What a kernel is launched with.

    Attributes:
        flops: of its matrix products.
        num_bytes: that it reads and writes at least.
    """

    operator: str
    flops: int
    num_bytes: int

    def seconds(self, gpu: str) -> float:
        """The roofline on a GPU of :data:`BANDWIDTHS`."""
        return max(self.flops / GPUS[gpu].flops, self.num_bytes / BANDWIDTHS[gpu])


class _Recorder(TorchDispatchMode):
    """Notes the launches of the package's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Launch] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "dynmoe":
            formula = flop_registry.get(function.overloadpacket)
            flops = formula(*args, out_val=None) if formula else 0
            num_bytes = bytes_of(function, args, {}, None)
            self.found.append(Launch(function.overloadpacket.__name__, flops, num_bytes))
        return function(*args, **(kwargs or {}))


def launches(sizes: Workload) -> list[Launch]:
    """Those of :data:`LAUNCHES`, in bf16.

    Raises:
        ValueError: a layer launches other kernels.
    """
    # Autograd takes no tensors of a GPU that is not there, so these are a CPU's.
    as_on_a_gpu = (
        mock.patch.object(known, "is_on_device", lambda tensor: True),
        mock.patch.object(kernels, "available", lambda device: True),
        mock.patch.object(fused, "uses_grouped_mm", lambda *_: False),
    )
    with FakeTensorMode(), _Recorder() as recorder, contextlib.ExitStack() as patches:
        for patch in as_on_a_gpu:
            patches.enter_context(patch)
        _run_layer(sizes)
        _rotate(sizes)
    found, listed = [launch.operator for launch in recorder.found], [row[0] for row in LAUNCHES]
    if found != listed:
        raise ValueError(f"a layer launches {found}, and LAUNCHES lists {listed}.")
    return recorder.found


def _run_layer(sizes: Workload) -> None:
    """Routing, order of the rows, and experts, forward and backward."""
    experts, hidden, ffn = sizes.experts, sizes.hidden, sizes.ffn
    logits_TE = torch.empty(sizes.tokens, experts, requires_grad=True)
    routing = route_fused(
        logits_TE,
        threshold=torch.empty(1),
        theta=torch.empty(1, requires_grad=True),
        renormalize=True,
        num_sequences=sizes.sequences,
    )
    num_rows = sizes.tokens * sizes.mean
    token_R, weight_R, *slots = order_by_expert(routing.map_TE, num_rows, all_used=True)
    weights = [
        torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        for shape in ((experts, 2 * ffn, hidden), (experts, hidden, ffn))
    ]
    for weight in weights:  # as Megatron's DistributedDataParallel does
        parameter: Any = weight
        parameter.main_grad = torch.empty(weight.shape)
        parameter.grad_added_to_main_grad = False
    output_TD = fused.fused_experts(
        torch.empty(sizes.tokens, hidden, dtype=torch.bfloat16, requires_grad=True),
        routing.weights_TE.reshape(-1).index_select(0, weight_R),
        *weights,
        routing.map_TE.sum(dim=0),
        RowOrder(token_R, weight_R, sizes.tokens, True, *slots),
    )
    (output_TD.sum() + routing.prob_sums_BE.sum() + routing.entropy).backward()


def _rotate(sizes: Workload) -> None:
    """Rotary positions of the queries, forward and backward."""
    batch, heads = sizes.sequences, sizes.hidden // HEAD_SIZE
    queries = torch.empty(
        sizes.sequence, batch, heads, HEAD_SIZE, dtype=torch.bfloat16, requires_grad=True
    )
    rotate(queries, torch.empty(sizes.sequence, 1, 1, HEAD_SIZE)).sum().backward()


def table(sizes: Workload = WORKLOADS["a"]) -> list[str]:
    """The lines of a Markdown table."""
    rows = ["| kernel | TFLOP | MB | H200, µs | A800, µs |", "| --- | --- | --- | --- | --- |"]
    for launch, (_, name, work) in zip(launches(sizes), LAUNCHES, strict=True):
        tflop = f"{launch.flops / 1e12:.3f}" if launch.flops else ""
        times = [_short(1e6 * launch.seconds(gpu)) for gpu in BANDWIDTHS]
        cells = [f"{work}, `{name}`", tflop, _short(launch.num_bytes / 1e6), *times]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _short(value: float) -> str:
    """Two digits, and whole numbers from 10 on."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


if __name__ == "__main__":
    CommandParser(description=__doc__.splitlines()[0]).parse_args()
    print("\n".join(table()))
