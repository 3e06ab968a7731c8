"""Measures time, memory and utilization of one MoE layer, forward and backward.

    python benchmarks/layer.py [--workloads a b] [--threads 2]

Workload a is a layer of Dynamic MoE (hidden 1024, FFN 2816, 16 experts, mean 2, 16384 tokens),
workload b is SonicMoE's (hidden 1536, FFN 256, 128 experts, mean 8, 24576 tokens), workload c that
of DTop-p's 6.9 B model (hidden 2048, FFN 896, 64 experts, mean 8, 8192 tokens). A GPU runs them at
this size in bf16, a CPU at a quarter of each size in float32. The routing is real, never balanced
by force. The first of the hidden states are the router's logits, and the gate passes them on, so
every provider routes by the same logits: those of a trained router for 16 experts, normal ones for
64 and 128, or those of --logits. DTop-p's threshold is calibrated on them, and the mean is
measured. The providers are:

    ours                   DTop-p on torch_native, with kernels on a GPU
    ours, experts fused    with the experts in Triton's kernels, too (only if it has them)
    ours, no kernels       the same in PyTorch alone
    ours, worst-case rows  memory for twice the mean, so that the host need not wait for the count
    plain reference        DTop-p on Megatron's local experts, without kernels
    stock top-k, BACKEND   Megatron's own
    dense                  an MLP as wide as the experts that a token uses

They take turns, on a GPU each in a process of its own. Rows are appended to OUTPUT/layer.csv, the
costliest operations of ours and of stock to OUTPUT/layer_profile.txt, each as soon as it is
measured. A provider that fails has a row that says why.
"""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import closing
from operator import attrgetter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import ceilings, measure
from benchmarks.layer_providers import (
    DENSE,
    OURS,
    STOCK,
    WORKLOADS,
    Provider,
    Workload,
    factories,
    logits_for,
)
from benchmarks.places import Failed, Turns, new_place
from megatron_dynmoe.settings.messages.command_line import CommandParser

PACKAGES = ("torch", "megatron-core")


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    add("--rounds", type=int, default=20)
    add("--seconds-budget", type=float, default=math.inf, help="of all rounds together")
    add("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    add("--logits", type=Path, help="a .pt file with a trained router's, [T, E]; one workload then")
    add("--sequence", type=int, help="tokens of a sequence, for a quick look")
    add("--output", type=Path, default=measure.RESULTS, help="folder (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure.Rows(args.output / "layer.csv", *PACKAGES)
    dtype = torch.bfloat16 if measure.on_gpu() else torch.float32
    cases = [case(name, dtype, args) for name in args.workloads]
    with closing(new_place()) as place:
        limits = place.run(ceilings.of_this_machine, dtype)
    args.seconds_budget /= len(cases)
    with Turns() as turns:
        for label, workload in cases:
            compare(turns, label, workload, dtype, limits, rows, args)


def case(name: str, dtype: torch.dtype, args: argparse.Namespace) -> tuple[str, Workload]:
    """A workload in the size for this machine, and what its rows call it."""
    workload = WORKLOADS[name] if measure.on_gpu() else WORKLOADS[name].scaled_down()
    if args.sequence:
        workload = workload._replace(sequence=args.sequence)
    try:
        kind, _ = logits_for(workload, args.logits)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    label = (
        f"layer {name}: hidden {workload.hidden}, ffn {workload.ffn}, {workload.experts} experts, "
        f"{workload.tokens} tokens, {str(dtype).removeprefix('torch.')}, {kind} logits"
    )
    return label + ("" if measure.on_gpu() else f", {torch.get_num_threads()} threads"), workload


def compare(
    turns: Turns,
    label: str,
    workload: Workload,
    dtype: torch.dtype,
    limits: ceilings.Ceilings,
    rows: measure.Rows,
    args: argparse.Namespace,
) -> None:
    """Measure and write down all providers of a workload."""

    def failed(name: str, failure: Failed) -> None:
        rows.put({"workload": label, "provider": name, "failed": str(failure)})

    turns.make(factories(workload, args.logits, dtype), failed)
    experts = turns.ask_all(attrgetter("experts_per_token"))
    taken = turns.take(Provider.timed, args.rounds, seconds=args.seconds_budget)
    stock = [sum(both) for both in taken.get(STOCK, [])]
    for name, times in taken.items():
        speed = str(measure.ratio(stock, [sum(both) for both in times])) if stock else ""
        found = row(label, name, workload, dtype, experts[name], times, limits, speed)
        rows.put(found, name=(label, name))  # what comes may fail
        if memory := turns.ask(name, Provider.memory):
            found["held_mb"] = f"{memory.held / 1e6:.4g}"
            found["peak_mb"] = f"{memory.peak / 1e6:.4g}"
            rows.put(found, name=(label, name))
        print(
            f"{label}: {name}: {found['forward_ms']} + {found['backward_ms']} ms, "
            f"{speed} times as fast as stock, {found['of_ceiling']} of the ceiling, "
            f"{found['peak_mb']} MB, load {found['load_1min']}",
            flush=True,
        )
        if memory and name in (OURS, STOCK):
            operations = turns.ask(name, Provider.operations)
            with (args.output / "layer_profile.txt").open("a") as file:
                file.write(f"{measure.COMMIT}, {label}, {name}\n{operations}\n")


def row(
    label: str,
    name: str,
    workload: Workload,
    dtype: torch.dtype,
    experts: float,
    times: list[tuple[float, ...]],
    limits: ceilings.Ceilings,
    speed: str,
) -> dict[str, str]:
    """The columns, without memory."""
    forward, backward, both = (
        measure.spread(seconds) for seconds in (*zip(*times, strict=True), [sum(t) for t in times])
    )
    flops = workload.flops(experts, dense=name == DENSE)
    roofline = limits.seconds(flops, workload.least_bytes(dtype.itemsize, dense=name == DENSE))
    data_sheet = ceilings.data_sheet_flops()
    return {
        "workload": label,
        "provider": name,
        "rounds": str(len(times)),
        "forward_ms": f"{1e3 * forward.median:.4g}",
        "forward_p20_ms": f"{1e3 * forward.p20:.4g}",
        "forward_p80_ms": f"{1e3 * forward.p80:.4g}",
        "backward_ms": f"{1e3 * backward.median:.4g}",
        "backward_p20_ms": f"{1e3 * backward.p20:.4g}",
        "backward_p80_ms": f"{1e3 * backward.p80:.4g}",
        "both_ms": f"{1e3 * both.median:.4g}",
        "tokens_per_s": f"{workload.tokens / both.median:.0f}",
        "experts_per_token": f"{experts:.3f}",
        "speed_ratio": speed,
        "held_mb": "",
        "peak_mb": "",
        "tflops_per_s": f"{flops / both.median / 1e12:.4g}",
        "ceiling_tflops_per_s": f"{limits.flops_per_s / 1e12:.4g}",
        "ceiling_gb_per_s": f"{limits.bytes_per_s / 1e9:.4g}",
        "of_ceiling": f"{flops / both.median / limits.flops_per_s:.3f}",
        "of_data_sheet": f"{flops / both.median / data_sheet:.3f}" if data_sheet else "",
        "roofline_ms": f"{1e3 * roofline:.4g}",
        "times_roofline": f"{both.median / roofline:.2f}",
        "load_1min": measure.load(),
    }


if __name__ == "__main__":
    main()
